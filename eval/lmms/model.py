"""The models that lmms-eval runs: ``--model pitome_llava --model_args pretrained=...,method=pitome,keep=144``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm

from pitome_mllm import attach, load
from pitome_mllm.loading import BITS
from pitome_mllm.methods import UserError
from pitome_mllm.serving.prompts import tokenized, tokens_read
from pitome_mllm.serving.resolution import CONTROL

from ..provenance import processor_name
from . import requests as ask
from .cost import Meter, at_most
from .manifest import NAME
from .pictures import Pictures
from .tables import PLAIN

RUN_ID = "LMMS_CACHE_RUN_ID"


class PitomeLlava(lmms):
    """A multimodal model with merged visual tokens, for tasks that give a context and pictures; also for likelihoods.

    Answers come in the order of the questions and one by one, so that lmms-eval's ``--use_cache`` stores each at once.
    A killed run finds them again under the same run id, which is therefore set unless the environment has one.

    Parameters
    ----------
    pretrained, bits, dtype
        As for `pitome_mllm.load`.
    method, keep, ratio, **settings
        As for `pitome_mllm.attach`; ``method=none``, or none of them, is the plain model, and ``method=max_pixels``
        with ``keep`` is the plain model on pictures scaled down to as many tokens, where pictures keep their size.
        What the processor knows of pictures goes there, such as ``max_pixels=501760`` or ``longest_edge=768``.
    batch_size : int or str, default 1
        Questions per batch.
    device, device_map : str, optional
        Where the model goes; ``device_map=auto`` spreads it. Default: a GPU if there is one.
    attn_implementation : str, optional
        Such as "sdpa" or "eager".
    system_prompt : str, default ""
        Text, or a file of it, before the first turn.
    loaded : tuple, optional
        Model and processor, if they are loaded already.
    """

    is_simple = True
    read = staticmethod(ask.simple)

    def __init__(
        self,
        pretrained: str = "llava-hf/llava-1.5-7b-hf",
        method: str | None = None,
        keep: int | float | None = None,
        ratio: float | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        bits: int | None = None,
        dtype: str | None = None,
        device: str | None = None,
        device_map: str | None = None,
        attn_implementation: str | None = None,
        system_prompt: str = "",
        loaded: tuple[Any, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        os.environ.setdefault(RUN_ID, NAME)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if not str(batch_size or 1).isdigit() or int(batch_size or 1) < 1:
            raise UserError(f"batch_size={batch_size!r} is not possible; give a number of questions, such as 8")
        self.pretrained, self.batch_size = pretrained, int(batch_size or 1)
        self.system_prompt = self._resolve_system_prompt(system_prompt)
        asked = {"method": method, "keep": keep, "ratio": ratio, **settings}
        self.settings = {name: value for name, value in asked.items() if value is not None}
        if loaded is None:
            where = place(device, device_map, bits, self.accelerator)
            loaded = load(pretrained, bits=bits, dtype=dtype, device=where)
        self.model, self.pictures = loaded[0], Pictures(*loaded, self.settings)
        self.processor = self.pictures.processor
        self.processor.tokenizer.padding_side = "left"
        if attn_implementation is not None:
            self.model.set_attn_implementation(attn_implementation)
        merging = self._merging(method)
        if method == PLAIN:
            del self.settings["method"]
        self.handle = attach(self.model, **merging) if merging else None
        self.meter = Meter(self.model, merging)
        self.batch_sizes = {}

    def _merging(self, method: str | None) -> dict[str, Any]:
        """The settings that `attach` gets; none for the plain model."""
        merging = {name: value for name, value in self.settings.items() if name not in self.pictures.options}
        taken = {PLAIN: {"method"}, CONTROL: {"method", "keep"}}.get(method or "")
        if taken is None:
            return merging
        if others := sorted(merging.keys() - taken):
            raise UserError(f"method={method} takes no settings, got {', '.join(others)}")
        return {}

    def __str__(self) -> str:
        """All that answers follow from: lmms-eval's cache knows the model by it where it gets the object itself."""
        about = {k: v for k, v in self.about().items() if k in ("bits", "dtype", "attention", "system_prompt") and v}
        return f"{self.title} {about}"

    @property
    def title(self) -> str:
        """Weights and settings, in short."""
        return f"{NAME}({', '.join([self.pretrained, *(f'{k}={v}' for k, v in self.settings.items())])})"

    @property
    def device(self) -> torch.device:
        return self.model.device

    def close(self) -> None:
        """Give the model back as it was."""
        if self.handle is not None:
            self.handle.remove()

    # What lmms-eval calls

    def generate_until(self, requests: Sequence[Any]) -> Sequence[GenerationResult]:
        return ask.LazyResults(self._each(requests, self.read, self._generate), len(requests))

    def loglikelihood(self, requests: Sequence[Any]) -> Sequence[GenerationResult]:
        """Mean negative log-likelihood per token, of which lmms-eval takes the smallest, and whether it is greedy.

        As results with the pair as their text: lmms-eval 0.7.3 makes a string of any other pair.
        """
        return ask.LazyResults(self._each(requests, ask.continuation, self._likelihoods), len(requests))

    def generate_until_multi_round(self, requests: Sequence[Any]) -> Sequence[Any]:
        raise NotImplementedError(f"{NAME} has no rounds of questions; choose tasks that ask once")

    def clean(self) -> None:
        """Called once after all answers, in every process: gather what they cost for the results."""
        found = self.meter.gather(self.world_size)
        self.meter.reset()
        # The one place in the results where a model may put words: config.batch_sizes, a list with these values.
        self.batch_sizes = {NAME: self.about() | {"cost": found}}
        if found and self.rank == 0:
            log_metrics(found["seconds"], int(found["total_new_tokens"]), found["tokens_per_second"], found)

    # How

    def about(self) -> dict[str, Any]:
        """Method, settings as they came out, and versions."""
        plan = None if self.handle is None else self.handle.plan
        settings = {} if plan is None else {f.name: getattr(plan, f.name) for f in fields(plan)}
        settings |= {"reducer": repr(plan.reducer)} if plan else {}
        settings.pop("geometry", None)
        packages = ("pitome_mllm", "torch", "transformers", "lmms_eval", "accelerate")
        gpu = self.device.type == "cuda"
        return {
            "pretrained": self.pretrained,
            "method": plan.method if plan else self.settings.get("method", PLAIN),
            "asked": self.settings,
            "settings": settings,
            "batch": self.batch_size,
            "processes": self.world_size,
            "dtype": str(self.model.dtype),
            "bits": next((n for n in BITS if getattr(self.model, f"is_loaded_in_{n}bit", False)), ""),
            "attention": self.model.config._attn_implementation,
            "system_prompt": self.system_prompt,
            "device": torch.cuda.get_device_name(self.device) if gpu else processor_name(),
            "versions": {name: version(name) for name in packages},
        }

    def _each(self, requests: Sequence[Any], read: Any, answer: Any) -> Iterator[Any]:
        """Answer batch by batch, in order."""
        with tqdm(total=len(requests), disable=self.rank != 0, desc=self.title, unit="question") as bar:
            start = 0
            while start < len(requests):
                batch = self._batch(requests, start)
                with ask.naming(batch):
                    asked = [read(request, self.task_dict) for request in batch]
                    answers = answer(asked)
                bar.update(len(batch))
                start += len(batch)
                yield from answers

    def _batch(self, requests: Sequence[Any], start: int) -> Sequence[Any]:
        """The next requests with equal options of generation."""
        batch = requests[start : start + self.batch_size]
        options = [[a for a in request.args if isinstance(a, dict)] for request in batch]
        same = next((n for n, option in enumerate(options) if option != options[0]), len(batch))
        return batch[:same]

    def _encode(self, asked: Sequence[ask.Asked], texts: Sequence[str]) -> Any:
        rows = [[self.pictures.seen(image) for image in one.images] for one in asked]
        inputs = tokenized(self.processor, texts, rows, padding=True)
        return inputs.to(self.device, dtype=self.model.dtype)

    @torch.inference_mode()
    def _generate(self, asked: Sequence[ask.Asked]) -> list[GenerationResult]:
        options, until = ask.generation(asked[0].options)
        inputs = self._encode(asked, [ask.prompt(self.processor, one, self.system_prompt) for one in asked])
        options["max_new_tokens"] = min(options["max_new_tokens"], self._room(asked, inputs))
        with self.meter.lap() as lap:
            ids = self.model.generate(**inputs, **options)
        new = ids[:, inputs["input_ids"].shape[1] :]
        rows = self._count(lap, asked, inputs, self._lengths(new))
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        return [
            GenerationResult(ask.cut(answer, until), TokenCounts(visual + text, new))
            for answer, (_, text, visual, new) in zip(texts, rows, strict=True)
        ]

    @torch.inference_mode()
    def _likelihoods(self, asked: Sequence[ask.Asked]) -> list[GenerationResult]:
        prompts = [ask.prompt(self.processor, one, self.system_prompt) for one in asked]
        whole = [f"{text} {one.continuation}" for text, one in zip(prompts, asked, strict=True)]
        lengths = [self._continued(*pair) for pair in zip(prompts, whole, strict=True)]
        inputs = self._encode(asked, whole)
        self._room(asked, inputs)
        with self.meter.lap() as lap:
            logits = self.model(**inputs, logits_to_keep=max(lengths) + 1).logits.float()
        self._count(lap, asked, inputs, [0] * len(asked))
        return [
            ask.likelihood(scores[-n - 1 : -1], ids[-n:])
            for scores, ids, n in zip(logits, inputs["input_ids"], lengths, strict=True)
        ]

    def _continued(self, prompt: str, whole: str) -> int:
        """Tokens of the continuation."""
        before, after = (self.processor.tokenizer(text)["input_ids"] for text in (prompt, whole))
        if after[: len(before)] != before or len(after) == len(before):
            raise UserError(f"the continuation of {prompt[-40:]!r} has no tokens of its own; rephrase the choice")
        return len(after) - len(before)

    def _room(self, asked: Sequence[ask.Asked], inputs: Any) -> int:
        """New tokens that the LLM can hold, at least 1; where the tower merges tiles, as far as is known by now."""
        whole, every = tokens_read(self.model, inputs)
        visual = at_most(self.handle, inputs, whole)
        longest = max(read - full + left for full, read, left in zip(whole, every, visual, strict=True))
        most = self.model.config.get_text_config().max_position_embeddings
        if longest >= most:
            raise UserError(f"the prompt of {longest} tokens does not fit: the model holds {most}; keep fewer tokens")
        return most - longest

    def _lengths(self, new: torch.Tensor) -> list[int]:
        """New tokens of every row, the one that ends it included; all of them where the model has no such token."""
        ends = self.model.generation_config.eos_token_id
        if ends is None:
            return [new.shape[1]] * len(new)
        ended = torch.isin(new, torch.tensor(ends, device=new.device)).cumsum(1)
        return ((ended == 0).sum(1) + (ended > 0).any(1)).tolist()

    def _count(self, lap: Any, asked: Sequence[ask.Asked], inputs: Any, new: Sequence[int]) -> list[Any]:
        """The `COUNTS` of each row with ``new`` tokens of an answer; the meter gets all but those that only pad."""
        pictures = [len(one.images) for one in asked]
        visual, read = tokens_read(self.model, inputs, self.handle.stats if self.handle and any(pictures) else None)
        counts = zip(pictures, read, visual, new, strict=True)
        rows = [(images, every - seen, seen, more) for images, every, seen, more in counts]
        if real := [row for one, row in zip(asked, rows, strict=True) if not one.padding]:
            self.meter.add(lap, real)
        return rows


class PitomeLlavaChat(PitomeLlava):
    """The same for tasks that give messages; lmms-eval's choice unless ``--force_simple`` is given."""

    is_simple = False
    read = staticmethod(ask.chat)


def place(device: str | None, device_map: str | None, bits: int | None, accelerator: Accelerator) -> Any:
    """What `load` takes as its device."""
    if accelerator.num_processes > 1:
        if device_map == "auto":
            raise UserError("device_map=auto spreads one model over all GPUs; start a single process for it")
        return accelerator.device
    if device_map is None and device is None and bits is None and torch.cuda.is_available():
        return "cuda"
    return device if device_map is None else device_map
