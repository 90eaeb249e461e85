"""One answer of one model: its words as they come, and what it cost by the clock and by calculation."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import StoppingCriteriaList, TextStreamer

from pitome_mllm.costs.answer import AnswerCost
from pitome_mllm.costs.latency import timed
from pitome_mllm.methods import UserError
from pitome_mllm.plan import Plan
from pitome_mllm.serving import prompts
from pitome_mllm.serving.prompts import Message, tokens_read

from .controls import Controls
from .engine import Engine
from .look import Look, looks, shows

NEW_TOKENS = 256  # longest answer where the model sets no limit of its own


def encode(engine: Engine, question: str, said: list[Message], images: list[Any], plan: Plan | None) -> tuple[Any, int]:
    """Model inputs on the model's device, and how many new tokens the answer may have; no plan = the plain model."""
    model = engine.model
    prompts.check_question(engine.processor, question)
    inputs, room = prompts.encode(model, engine.processor, said, images, 1, plan)
    return inputs.to(model.device, dtype=model.dtype), min(room, model.generation_config.max_new_tokens or NEW_TOKENS)


@dataclass(frozen=True)
class Outcome:
    """What a run cost and what the plain model would cost, and a look at every picture where there is one."""

    figures: AnswerCost
    plain: AnswerCost
    looks: tuple[Look, ...] = ()


@dataclass(frozen=True)
class Event:
    """One thing that happened to a run: a piece of its text, runs ahead of it in the queue, or its result."""

    text: str = ""
    ahead: int = 0
    result: Any = None


class Stopped(Exception):
    """A visitor stopped a run before it began."""


class _Words(TextStreamer):
    """Hands every finished piece of text to a function."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.say = say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.say(text)


def stream(engine: Engine, work: Callable[[Callable[[str], None]], Any], stop: threading.Event) -> Iterator[Event]:
    """Run ``work`` on the engine's thread and yield what happens, the last event with its result.

    ``work`` gets a function to say pieces of text with. ``stop`` ends the run (`Stopped` if it had not begun), and is
    set when the caller of this generator goes away.
    """
    said: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def run() -> Any:
        if stop.is_set():
            raise Stopped
        return work(said.put)

    future = engine.submit(run)
    future.add_done_callback(lambda _: said.put(None))
    piece: str | None = ""
    try:
        while piece is not None:
            try:
                piece = said.get(timeout=0.2)
            except queue.Empty:
                if stop.is_set():
                    future.cancel()  # if it still waits; a run that began ends by its clock
                yield Event(ahead=engine.ahead(future))
                continue
            if piece:
                yield Event(text=piece)
    except GeneratorExit:
        stop.set()
        raise
    if future.cancelled():
        raise Stopped
    try:
        result = future.result()
    except torch.cuda.OutOfMemoryError as error:
        raise UserError("not enough memory for this; clear the conversation, or keep fewer tokens") from error
    yield Event(result=result)


def answer(
    engine: Engine, inputs: Any, room: int, pictures: Any, controls: Controls | None, title: str, stop: threading.Event,
    full: Any = None,
) -> Iterator[Event]:  # fmt: skip
    """Generate greedily; yields as `stream`, at last an `Outcome`. ``controls`` None = the plain model.

    ``full`` are the inputs that it is measured by, where ``inputs`` have smaller pictures.
    """

    def stopped(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), stop.is_set(), device=input_ids.device)

    def work(say: Callable[[str], None]) -> Outcome:
        with _using(engine, controls), timed(engine.model) as clock:
            engine.model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                max_new_tokens=room,
                streamer=_Words(engine.processor.tokenizer, say),
                stopping_criteria=StoppingCriteriaList([stopped]),
            )
            stats = engine.handle.stats
        (visual,), (read,) = tokens_read(engine.model, inputs, stats)
        (every,), (whole,) = tokens_read(engine.model, full or inputs)
        return Outcome(
            _figures(engine, clock.cost(), controls, len(pictures), visual, read),
            _figures(engine, AnswerCost(), None, len(pictures), every, whole),
            () if stats is None else tuple(looks(engine.processor, pictures, stats, title)),
        )

    return stream(engine, work, stop)


def look_only(
    engine: Engine, pictures: Any, plan: Plan, controls: Controls, title: str, stop: threading.Event
) -> Iterator[Event]:
    """Show pictures to the vision tower alone; yields as `stream`, at last an `Outcome`."""
    if not shows(plan):
        raise UserError("this model merges behind the vision tower, so there is nothing to look into; ask a question")

    def work(say: Callable[[str], None]) -> Outcome:
        with _using(engine, controls), timed(engine.model) as clock:
            engine.see([picture.image for picture in pictures])
            stats = engine.handle.stats
        counts = len(pictures) * plan.keep, len(pictures) * plan.available
        if plan.where == "packed":
            counts = sum(stats.lengths), sum(map(len, stats.groups))
        elif engine.geometry.family.tiles:  # how many tokens the tiles come to, is known behind the tower
            counts = None, None
        figures = AnswerCost(counts[0], tower_ms=clock.cost().tower_ms)
        return Outcome(figures, AnswerCost(counts[1]), tuple(looks(engine.processor, pictures, stats, title)))

    return stream(engine, work, stop)


def _using(engine: Engine, controls: Controls | None) -> Any:
    if controls is None:
        return engine.handle.using(None)
    return engine.handle.using(**controls.settings(), energies=True)


def _figures(
    engine: Engine, measured: AnswerCost, controls: Controls | None, pictures: int, visual: int, prompt: int
) -> AnswerCost:
    """What was measured, with what is counted and calculated."""
    kv, gflops = engine.cost(controls, pictures, prompt)
    return replace(measured, visual_tokens=visual, prompt_tokens=prompt, kv_cache_mb=kv, gflops=gflops)
