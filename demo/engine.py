"""The model of the chat: one for all visitors, used by one run at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import Any

import torch
from PIL import Image

from pitome_mllm import attach, estimate
from pitome_mllm.costs.flops import flops_known, kv_bytes_per_token
from pitome_mllm.costs.published import SHAPES
from pitome_mllm.families.features import (
    picture_features,
    picture_inputs,
    pixel_values,
    tokens_of_picture,
    tower_features,
)
from pitome_mllm.plan import Plan, make_plan
from pitome_mllm.serving.prompts import Message, encode
from pitome_mllm.serving.resolution import cell, smaller, without_floor
from pitome_mllm.settings import Settings

from .controls import Controls

SEVEN = SHAPES["llava-1.5-7b"]


class Engine:
    """The attached model of this process, with a thread on which runs take turns in the order they came.

    Settings are per run, through ``handle.using``; ``model`` and ``processor`` come plain, as `load` gives them.
    """

    def __init__(self, name: str, model: Any, processor: Any) -> None:
        self.name, self.model, self.processor = name, model, processor
        self.handle = attach(model, keep=0.25)
        self.geometry = self.handle.geometry
        self._runs: list[Future] = []  # those that wait or run, in their order
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._desk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="desk")
        self._picture_flops = lru_cache(maxsize=256)(self._per_picture)  # counting them takes a good part of a second

    @property
    def available(self) -> int | None:
        """Visual tokens per picture of the plain model; None where they depend on the picture's size."""
        return None if self.geometry.family.side else self.geometry.available

    @property
    def scales(self) -> bool:
        """Whether a smaller picture has fewer visual tokens."""
        return cell(self.processor) > 0

    def warm_up(self) -> None:
        """Run the tower once merged and once plain, so that the first figures are like all others."""
        blank = [Image.new("RGB", (32, 32))]
        self.see(blank)
        with self.handle.using(None):
            self.see(blank)

    def see(self, images: Sequence[Image.Image]) -> None:
        """Show images to all that comes before the LLM, merged as is chosen now."""
        plan = self.handle.plan
        if not self.geometry.family.merges_in_tower or (plan and plan.where == "packed"):
            inputs = picture_inputs(self.processor, images).to(self.model.device, dtype=self.model.dtype)
            picture_features(self.handle.core, inputs)
        else:
            tower_features(self.model, torch.cat([pixel_values(self.processor, image) for image in images]))

    def encode_smaller(
        self, said: Sequence[Message], images: Sequence[Image.Image], controls: Controls
    ) -> tuple[Any, int]:
        """Inputs of a conversation about smaller images, of as many tokens as ``controls`` leave, and its room."""
        kept, mark = self.plan(controls).kept, self.model.config.image_token_id
        full = [tokens_of_picture(self.processor, image, mark) for image in images]
        seen = [smaller(self.processor, image, kept(tokens)) for image, tokens in zip(images, full, strict=True)]
        return encode(self.model, without_floor(self.processor), said, seen, 1)

    def plan(self, controls: Controls) -> Plan:
        """What the settings come to; UserError if they are not possible here."""
        return make_plan(Settings().changed(**controls.settings()), self.geometry)

    def prepare(self, work: Callable[..., Any], *given: Any) -> Any:
        """Do something short that takes much memory, such as decoding, on one thread; threads keep what they had."""
        return self._desk.submit(work, *given).result()

    def submit(self, run: Callable[[], Any]) -> Future:
        """Queue a run on the model's thread."""
        future = self._thread.submit(run)
        with self._lock:
            self._runs.append(future)
        future.add_done_callback(self._finished)
        return future

    def ahead(self, run: Future) -> int:
        """How many runs come before one that `submit` returned."""
        with self._lock:
            return self._runs.index(run) if run in self._runs else 0

    def _finished(self, run: Future) -> None:
        with self._lock:
            self._runs.remove(run)  # and with it what its visitor holds

    def cost(self, controls: Controls | None, pictures: int, prompt_tokens: int) -> tuple[float, float | None]:
        """MB of the prompt's KV cache, and 10^9 FLOPs up to the first new token (None = not known).

        ``controls`` None = the plain model; ``prompt_tokens`` as the LLM reads them.
        """
        kv = prompt_tokens * kv_bytes_per_token(self.model.config.text_config, self.model.dtype) / 1e6
        if self.available is None or not flops_known(self.model.config):
            return kv, None
        llm = estimate(self.model, images=0, text_tokens=prompt_tokens).prefill_flops
        return kv, (pictures * self._picture_flops(controls) + llm) / 1e9

    @cached_property
    def burden(self) -> str:
        """What decides the cost of an answer, here and in a model of seven billion parameters, in words."""
        known = flops_known(self.model.config)
        here = f"In {self.name} {_of_tower(self.model)}. " if known and self.available is not None else ""
        there = f"In {SEVEN.title} {_of_tower(SEVEN.config())}"
        return (
            f"{here}{there}. Where that share is large, merging inside the tower saves most; where it is small, the "
            "number of tokens that the language model reads decides."
        )

    def _per_picture(self, controls: Controls | None) -> int:
        """FLOPs of tower, merging and projector for one picture."""
        one = estimate(self.model, **({} if controls is None else controls.settings()), text_tokens=0)
        return one.tower_flops + one.merging_flops + one.projector_flops


def _of_tower(model: Any) -> str:
    cost = estimate(model)
    tower = cost.tower_flops + cost.projector_flops
    return f"{tower / (tower + cost.prefill_flops):.0%} of the arithmetic before the first word is the vision tower's"
