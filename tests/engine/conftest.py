"""Small models as checkpoints, vLLM engines on them in this process, and what transformers answers with the same."""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
sys.path.insert(0, str(Path(__file__).parents[1]))  # models and families

import families
import models
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)


def family(name: str) -> Any:
    return next(one for one in families.FAMILIES if one.model == name)


def built(name: str) -> tuple[Any, Any]:
    """A small model in float32 with fixed weights, and its processor."""
    if name == "next":
        row = family("LlavaNextForConditionalGeneration")
        return row.build().float(), row.processor(models.tokenizer())
    tower, strategy = name.split("-")
    model = models.build(tower=tower, strategy=strategy, dtype=torch.float32)
    return model, models.processor(strategy, class_token=tower == "clip")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folders by name: "clip-default", "siglip-full", "next"; ``old`` has the names of transformers 4."""

    @cache
    def make(name: str, old: bool = False) -> Path:
        folder = tmp_path_factory.mktemp(name)
        model, processor = built(name)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        if old:
            (file,) = folder.glob("*.safetensors")
            saved = load_file(file)
            parts = ("embeddings", "encoder", "pre_layrnorm", "post_layernorm")
            renamed = {
                key.replace(f"vision_tower.{part}", f"vision_tower.vision_model.{part}"): weight
                for key, weight in saved.items()
                for part in [next((p for p in parts if f"vision_tower.{p}" in key), "none")]
            }
            assert renamed.keys() != saved.keys()
            save_file(renamed, file, metadata={"format": "pt"})
        return folder

    return make


@pytest.fixture(scope="session")
def engine(checkpoint):
    """vLLM on a checkpoint, made once for equal arguments; without settings it is vLLM's own model."""
    from vllm import LLM

    made: dict[str, Any] = {}

    def make(name: str, settings: dict[str, Any] | None = None, old: bool = False, **options: Any) -> Any:
        key = repr((name, settings, old, options))
        if key not in made:
            folder = checkpoint(name, old)
            (own,) = transformers.AutoConfig.from_pretrained(folder).architectures
            ours = {"architectures": [f"Pitome{own}"], "visual_token_merging": settings}
            given = dict(
                dtype="float32", max_model_len=2048, enforce_eager=True, limit_mm_per_prompt={"image": 4},
                num_gpu_blocks_override=512, seed=0, hf_overrides=ours if settings else {},
            )  # fmt: skip
            made[key] = LLM(str(folder), **{**given, **options})
        return made[key]

    yield make
