"""Answers of one attached model to chat requests, one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import AsyncTextIteratorStreamer, StoppingCriteria

from ..attach import Attachment
from ..errors import UserError
from ..plan import Plan
from .prompts import TooLong, encode, mark_of_pictures, tokens_read
from .requests import ChatRequest, Refused, Text

NEW_TOKENS = 1024  # longest answer where neither request nor model sets a limit


@dataclass
class Job(StoppingCriteria):
    """One request on its way, and what came of it: `generate` asks it after every token whether the answer ends."""

    request: ChatRequest
    plan: Plan
    tokenizer: Any
    inputs: Any
    visual: int  # tokens of the prompt before merging
    new_tokens: int  # at most
    given_up: Event = field(default_factory=Event)
    stopped: bool = False  # by one of the request's stop strings, or by the model
    merged: int = 0  # visual tokens that the LLM got,
    read: int = 0  # and tokens of the prompt
    written: int = 0

    @property
    def prompt(self) -> int:
        return self.inputs["input_ids"].shape[1]

    @property
    def stop(self) -> Sequence[str]:
        return self.request.stop or ()

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self.stop:
            text = self.tokenizer.decode(ids[0, self.prompt :], skip_special_tokens=True)
            self.stopped = any(stop in text for stop in self.stop)
        return torch.full((len(ids),), self.stopped or self.given_up.is_set(), device=ids.device)

    @property
    def finish_reason(self) -> str:
        return "length" if self.written >= self.new_tokens and not self.stopped else "stop"

    @property
    def usage(self) -> dict[str, Any]:
        """OpenAI's figures, of the prompt as the LLM reads it, and visual tokens before and after merging."""
        counts = {"prompt_tokens": self.read, "completion_tokens": self.written}
        counts["total_tokens"] = self.read + self.written
        return {**counts, "visual_tokens": {"before": self.visual, "after": self.merged}}


class Engine:
    """One attached model and its processor, under the name that requests call it by."""

    def __init__(self, name: str, handle: Attachment, processor: Any) -> None:
        self.name, self.handle, self.processor = name, handle, processor
        self._thread = ThreadPoolExecutor(1)  # CUDA graphs want one thread, and answers take turns anyway

    def prepare(self, request: ChatRequest, pictures: Sequence[Image.Image]) -> Job:
        """All that may be wrong with a request is found here, before anything runs; `Refused`."""
        plan, processor, model = self._plan(request), self.processor, self.handle.model
        turns = list(self._turns(request))
        try:
            inputs, room = encode(model, processor, turns, pictures, request.new_tokens or 1, plan)
        except TemplateError as error:
            raise Refused(f"the messages do not fit the model's chat template: {error}", "messages") from error
        except TooLong as error:
            raise Refused(str(error), "messages", "context_length_exceeded") from error
        (visual,), _ = tokens_read(model, inputs)
        if request.keep is not None:
            self._check_keep(request, plan, visual // max(len(pictures), 1))
        usual = min(room, model.generation_config.max_new_tokens or NEW_TOKENS)
        return Job(request, plan, processor.tokenizer, inputs, visual, request.new_tokens or usual)

    def _plan(self, request: ChatRequest) -> Plan:
        """What a request comes to."""
        served = self.handle.plan
        if request.keep is None:
            return served
        try:
            with self.handle.using(keep=request.keep):
                return self.handle.plan
        except UserError as error:
            raise Refused(f"keep: {error}", "keep") from error

    def _check_keep(self, request: ChatRequest, plan: Plan, tokens: int) -> None:
        """Refuse more visual tokens than are served, of a picture of so many ``tokens`` where pictures differ."""
        sized = plan.geometry.family.side
        asked, most = (one.kept(tokens) if sized else one.keep for one in (plan, self.handle.plan))
        if asked > most:
            counts = f"{asked} visual tokens; at most {most}"
            raise Refused(f"keep={request.keep} comes to {counts} are served", "keep")

    def _turns(self, request: ChatRequest) -> Any:
        """The messages as `prompts` takes them."""
        for number, message in enumerate(request.messages):
            parts = []
            for part in message.content:
                is_text = isinstance(part, Text)
                if is_text and (mark := mark_of_pictures(self.processor, part.text)):
                    raise Refused(
                        f"a text holds {mark!r}, which stands for a picture; leave it out", f"messages.{number}"
                    )
                parts.append({"type": "text", "text": part.text} if is_text else {"type": "image"})
            yield {"role": "system" if message.role == "developer" else message.role, "content": parts}

    async def answer(self, job: Job) -> AsyncIterator[str]:
        """The answer's text as it comes; whoever stops to listen ends it."""
        streamer = AsyncTextIteratorStreamer(job.tokenizer, skip_prompt=True, skip_special_tokens=True)
        running = asyncio.get_running_loop().run_in_executor(self._thread, self._generate, job, streamer)
        try:
            async for text in until(streamer, job.stop):
                yield text
            await running
        finally:
            job.given_up.set()

    def _generate(self, job: Job, streamer: Any) -> None:
        try:
            if job.given_up.is_set():
                return
            request, model = job.request, self.handle.model
            if request.seed is not None:
                torch.manual_seed(request.seed)
            with self.handle.choosing(job.plan):
                inputs = job.inputs.to(model.device, dtype=model.dtype)
                limits: dict[str, Any] = {"max_new_tokens": job.new_tokens, "stopping_criteria": [job]}
                ids = model.generate(**inputs, **request.sampling, **limits, streamer=streamer)
            ends = model.generation_config.eos_token_id
            job.stopped |= int(ids[0, -1]) in (ends if isinstance(ends, list) else [ends])
            job.written = ids.shape[1] - job.prompt
            (job.merged,), (job.read,) = tokens_read(model, inputs, self.handle.stats if job.visual else None)
        finally:
            streamer.end()


async def until(texts: AsyncIterator[str], stops: Sequence[str]) -> AsyncIterator[str]:
    """The texts up to the first of ``stops``; what may be the beginning of one waits for what follows."""
    held, ahead = "", max(map(len, stops), default=1) - 1
    async for text in texts:
        held += text
        ends = [at for at in map(held.find, stops) if at >= 0]
        ready = held[: min(ends)] if ends else held[: len(held) - ahead]
        if ready:
            yield ready
        if ends:
            held = ""
            break
        held = held[len(ready) :]
    if held:
        yield held
