"""The stages that the benchmark of speed times, as calls without arguments."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pitome_mllm import Attachment
from pitome_mllm.families.features import read
from pitome_mllm.families.geometry import family_of, geometry
from pitome_mllm.hooks.caches import cache_of, name_for
from pitome_mllm.hooks.call import Call as Prompt
from pitome_mllm.hooks.capture import Capture, new_pool
from pitome_mllm.methods.pitome import PiToMe

from ..clocks import Call
from .contenders import Contender
from .picture import Picture

# Stage -> what it is. Those of `EAGER` run through transformers' own loops, which no graph holds.
STAGES = {
    "preprocess": "the processor, for the pictures of a batch",
    "tower": "the vision tower with its merging, in front of the projector too",
    "merge": "merging alone, on random tensors, without the sizes in attention",
    "yardstick": "the mean keys, one exp for every pair of tokens, one copy; where keys' energies decide",
    "projector": "the projector, for the tokens that are left",
    "llm": "the LLM over the prompt, with the logits of its last position",
    "prefill": "tower, projector and LLM one after the other",
    "first token": "generate() of one token: prefill, prompt, all that surrounds them",
    "decode": "each further token, with the cache of the prompt",
    "end to end": "preprocessing and generate() of all new tokens",
}
EAGER = ("preprocess", "first token", "decode", "end to end")
SHORT = Prompt({}, torch.zeros(1, 0, dtype=torch.bool))  # says that nothing is left to shorten
MERGES = ("merge", "yardstick")  # beside each other on the same tensors
IN_FRONT = ("preprocess", "tower", *MERGES, "projector")


@dataclass(frozen=True)
class Load:
    """What all contenders get: ``batch`` rows of ``images`` pictures and ``text_tokens`` tokens of text."""

    batch: int
    images: int
    text_tokens: int
    new_tokens: int
    processor: Any

    def pictures(self, side: int) -> list[Image.Image]:
        """Noise, of half as many pixels again as the model looks at."""
        rng = np.random.default_rng(0)
        shape = (side * 3 // 2, side * 3 // 2, 3)
        return [Image.fromarray(rng.integers(0, 256, shape, np.uint8)) for _ in range(self.batch * self.images)]


def captured(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """``run`` as a CUDA graph, which writes over what it made; itself on a device that has none."""
    if device.type != "cuda":
        return run
    run()
    return partial(Capture(run, [], new_pool(), device).replay, [], lambda made: made)


def prompt(model: Any, load: Load, pixels: Tensor) -> dict[str, Tensor]:
    """Pictures and random text, as a processor makes them."""
    config = model.config
    image, vocabulary = config.image_token_id, config.text_config.vocab_size
    text = torch.randint(0, vocabulary - 1, (load.text_tokens,), generator=torch.Generator().manual_seed(0))
    text = text + (text >= image)
    ids = torch.cat([torch.full((load.images * geometry(config).available,), image), text])
    ids = ids.repeat(load.batch, 1).to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


class Stages:
    """The stages of one contender under one load; those that are not `EAGER` as CUDA graphs where ``mode`` says so."""

    def __init__(self, contender: Contender, load: Load, mode: str = "eager") -> None:
        self.mode = mode
        self.contender, self.load, self.model = contender, load, contender.model
        config, family = self.model.config, family_of(self.model.config)
        self.config, self.geometry = config, geometry(config)
        self.tower, self.projector = map(self.model.get_submodule, (family.tower, family.projector))
        self.llm = contender.llm
        self.language = self.llm.get_submodule(family.language)
        self.keep = contender.plan.keep if contender.plan else self.geometry.available
        vision, count = config.vision_config, load.batch * load.images
        self.random = torch.Generator().manual_seed(0)
        self.pixels = self._draw(count, 3, vision.image_size, vision.image_size)
        self.tokens = self._draw(count, self.keep, vision.hidden_size)
        self.pictures = load.pictures(vision.image_size)

    def _draw(self, *shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=self.random)
        return drawn.to(self.model.device, self.model.dtype)

    def call(self, stage: str) -> Call | None:
        """What to time; None where the contender has no such stage of its own."""
        makes = getattr(self, "_" + stage.replace(" ", "_"))()
        if self.mode == "graph" and stage not in EAGER and makes is not None:
            makes = captured(makes, self.model.device)
        return Call(makes) if callable(makes) else makes

    def _preprocess(self) -> Any:
        return self.preprocessed if self.contender.plan is None else None  # the same for all

    def preprocessed(self) -> Tensor:
        """(B * I, 3, H, W)."""
        return self.load.processor(images=self.pictures, return_tensors="pt")["pixel_values"]

    def _tower(self) -> Any:
        return self.features

    def features(self) -> Tensor:
        """(B * I, K, C), what the projector gets."""
        states = read(self.tower(self.pixels, output_hidden_states=True), self.geometry)
        return states[:, self.geometry.class_tokens - self.geometry.visible_class_tokens :]

    def _merge(self) -> Any:
        if self.contender.plan is None or self.contender.is_oracle:
            return None
        return self.picture.merge

    def _yardstick(self) -> Any:
        plan = self.contender.plan
        if plan is None or not isinstance(plan.reducer, PiToMe) or not plan.merging or "keys" not in plan.match_inputs:
            return None
        return self.picture.yardstick

    @cached_property
    def picture(self) -> Picture:
        count = self.load.batch * self.load.images
        return Picture(self.contender.plan, self.config, count, self.model.dtype, self.model.device)

    def _projector(self) -> Any:
        return partial(self.projector, self.tokens)

    def _llm(self) -> Any:
        return partial(self.logits, self.projected, self.text)

    @cached_property
    def projected(self) -> Tensor:
        return self._draw(self.load.batch, self.load.images * self.keep, self.config.text_config.hidden_size)

    @cached_property
    def text(self) -> Tensor:
        return self._draw(self.load.batch, self.load.text_tokens, self.config.text_config.hidden_size)

    def logits(self, visual: Tensor, text: Tensor) -> Tensor:
        """(B, vocabulary) behind visual tokens (B, I * K, D) and text (B, T, D)."""
        states = self.language(inputs_embeds=torch.cat([visual, text], 1), use_cache=True).last_hidden_state
        return self.llm.lm_head(states[:, -1])

    def _prefill(self) -> Any:
        text = self.text
        return lambda: self.logits(self.projector(self.features()).view(self.load.batch, -1, text.shape[-1]), text)

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return prompt(self.model, self.load, self.pixels)

    def _first_token(self) -> Any:
        return None if self.contender.is_oracle else lambda: self.generate(self.pixels, 1)

    def generate(self, pixels: Tensor, new_tokens: int) -> Tensor:
        """The greedy answer of exactly so many tokens."""
        inputs = {**self.inputs, "pixel_values": pixels.to(self.model.device, self.model.dtype)}
        length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        return self.model.generate(**inputs, **length, do_sample=False, num_beams=1, pad_token_id=0)

    def _decode(self) -> Call:
        steps, token = max(1, self.load.new_tokens - 1), self.inputs["input_ids"][:, -1:]
        length, handle, past = self.cache.get_seq_length(), Attachment.of(self.llm), {name_for(self.llm): self.cache}
        mask = torch.ones(self.load.batch, length + steps, dtype=torch.long, device=self.model.device)

        def run() -> None:
            with (
                handle.choosing(handle.plan, SHORT) if handle else nullcontext()
            ):  # as generate() does, whose prompt is short
                for step in range(steps):
                    seen = mask[:, : length + step + 1]
                    self.llm(input_ids=token, attention_mask=seen, use_cache=True, **past)

        def back() -> None:
            if extra := self.cache.get_seq_length() - length:
                self.cache.crop(-extra)

        return Call(run, back, steps)

    @cached_property
    @torch.inference_mode()
    def cache(self) -> Any:
        """The KV cache of the prompt; that of an oracle holds as many tokens without any merging."""
        if not self.contender.is_oracle:
            return cache_of(self.llm(**self.inputs, use_cache=True, logits_to_keep=1))
        embeds = torch.cat([self.projected, self.text], 1)
        return cache_of(self.llm(inputs_embeds=embeds, use_cache=True, logits_to_keep=1))

    def kv_bytes(self) -> int:
        """Of the prompt's cache."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)

    def _end_to_end(self) -> Any:
        if self.contender.is_oracle:
            return None
        return lambda: self.generate(self.preprocessed(), self.load.new_tokens)
