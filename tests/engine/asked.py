"""Requests as vLLM takes them, its answers, and those of transformers with the same settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import torch
import transformers
from vllm import SamplingParams

from pitome_mllm import attach

TOKENS = 12  # of an answer


def request(prompt: str, *pictures: Any, keep: Any = None) -> dict[str, Any]:
    """One prompt as vLLM takes it."""
    images = {"multi_modal_data": {"image": list(pictures)}} if pictures else {}
    asked = {} if keep is None else {"mm_processor_kwargs": {"visual_token_merging": {"keep": keep}}}
    return {"prompt": prompt, **images, **asked}


def answers(llm: Any, requests: list[dict[str, Any]], tokens: int = TOKENS) -> list[list[int]]:
    """The greedy tokens of each request."""
    return [list(output.outputs[0].token_ids) for output in outputs(llm, requests, tokens)]


def outputs(llm: Any, requests: list[dict[str, Any]], tokens: int = TOKENS) -> list[Any]:
    """What vLLM says of each request."""
    return llm.generate(requests, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)


def expected(folder: Path, requests: list[dict[str, Any]], **settings: Any) -> list[list[int]]:
    """What transformers answers, with the settings attached; without any, the plain model."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    handle = attach(model, calibration="none", **settings) if settings else None
    found = []
    for one in requests:
        keep = one.get("mm_processor_kwargs", {}).get("visual_token_merging", {}).get("keep")
        if handle and keep is not None:
            handle.update(keep=keep)
        images = one.get("multi_modal_data", {}).get("image")
        inputs = processor(images=images, text=[one["prompt"]], return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, pad_token_id=models.PAD)
        found.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
        if handle and keep is not None:
            handle.update(keep=settings["keep"])
    return found
