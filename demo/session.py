"""The chat's state and logic: a conversation and its turns. It knows nothing of the page.

Read `Conversation.ask` first. `turns` is what was said, `runs` one answer, `engine` the model, `look` what
merging did, `visitors` who holds a conversation.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pitome_mllm.methods import UserError
from pitome_mllm.serving.resolution import CONTROL

from .controls import NOTHING, PLAIN, Controls, label
from .engine import Engine
from .look import Look
from .pictures import Picture, open_upload
from .runs import Event, Stopped, answer, encode, look_only
from .turns import Reply, Turn, history

MAX_PICTURES = 8  # in one conversation
MAX_TURNS = 100
MAX_LOOKS = 10  # turns back for which one can still look inside
PATIENCE, ENDING = 0.5, 20.0  # seconds to wait for an answer's last words, and for one that was told to stop


class Conversation:
    """One visitor's chat. Its methods may be called from any thread; one answer is written at a time."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.turns: list[Turn] = []
        self.live: Look | None = None  # of the last `preview` that was shown
        self.seen = time.monotonic()
        self._busy = threading.Lock()
        self._stop = threading.Event()
        self._gone = False

    # asking

    def ask(
        self, question: str, files: Sequence[str | Path], controls: Controls, compare: str = NOTHING, anew: bool = False
    ) -> Iterator[Turn]:
        """Add a turn and write its replies, yielding the turn whenever there is something new to show.

        A UserError (a broken picture, an impossible setting or question, an answer still being written) leaves the
        conversation as before. A question "" with pictures only looks at them; `PLAIN` or a method to ``compare`` with
        answers first; ``anew`` ends and forgets what was before.
        """
        if anew:
            self.clear()
        with self._one_at_a_time(ENDING if anew else PATIENCE):
            pictures = [self.engine.prepare(open_upload, path) for path in files]
            yield from self._ask(question.strip(), pictures, controls, compare)

    def retry(self, controls: Controls, compare: str = NOTHING) -> Iterator[Turn]:
        """Ask the last question again, with other settings if you like; as `ask`."""
        with self._one_at_a_time():
            if not self.turns:
                raise UserError("there is nothing to ask again yet; ask something first")
            last = self.turns.pop()
            try:
                yield from self._ask(last.question, last.pictures, controls, compare)
            except ValueError:
                self.turns.append(last)
                raise

    def preview(self, picture: Picture, controls: Controls) -> Look:
        """What these settings do to a picture: one pass of the tower, outside of the conversation."""
        self.seen = time.monotonic()
        plan = self.engine.plan(controls)
        title = label(plan, self.engine.geometry)
        *_, last = look_only(self.engine, [picture], plan, controls, title, threading.Event())
        if not last.result.looks:
            raise UserError("the visual tokens of this picture form no grid to draw groups on")
        return last.result.looks[0]

    def stop(self) -> None:
        """End the answer that is being written; what there is of it stays."""
        self._stop.set()

    def clear(self) -> None:
        """Forget everything."""
        self.stop()
        self.turns, self.live = [], None

    def to_dict(self) -> dict[str, Any]:
        """The conversation for a JSON file."""
        return {"model": self.engine.name, "turns": [turn.to_dict() for turn in self.turns]}

    def leave(self) -> None:
        """Forget everything for good; what is being written ends."""
        self._gone = True
        self.clear()

    @property
    def busy(self) -> bool:
        return self._busy.locked()

    # inside

    @contextmanager
    def _one_at_a_time(self, patience: float = PATIENCE) -> Iterator[None]:
        if not self._busy.acquire(timeout=patience):  # the last words may be out a moment before the end is
            raise UserError("an answer is still being written; wait for it, or stop it")
        try:
            self.seen = time.monotonic()
            self._stop = threading.Event()
            if self._gone:
                raise UserError("this conversation has ended; start a new one")
            yield
        finally:
            self.seen = time.monotonic()
            self._busy.release()

    def _ask(self, question: str, pictures: list[Picture], controls: Controls, compare: str) -> Iterator[Turn]:
        turn = Turn(question, pictures)
        past = [*self.turns, turn]
        lanes = self._lanes(question, controls, compare)
        self._check_room(past)
        count = sum(len(asked.pictures) for asked in (past if question else [turn]))
        for lane, (settings, plan) in lanes.items():
            turn.replies[lane] = Reply(label(plan, self.engine.geometry, count), settings, self.engine.name)
        if CONTROL in lanes:
            said = f"the plain model on smaller pictures, as many tokens as {controls.method} leaves"
            turn.replies[CONTROL].label = said
        runs = {lane: self._run(past, lane, *lanes[lane], controls) for lane in lanes}  # checked before anything shows
        self.turns = past
        for old in past[:-MAX_LOOKS]:
            old.forget_looks()
        try:
            yield turn
            for lane, events in runs.items():
                yield from self._write(turn, lane, events)
        except Stopped:
            pass  # before it began: what there is stays
        except Exception:
            self.turns = [kept for kept in self.turns if kept is not turn]
            raise
        finally:
            turn.end()
        yield turn

    def _lanes(self, question: str, controls: Controls, compare: str) -> dict[str, tuple[Controls | None, Any]]:
        """Settings and plan of everyone who answers; the plain model has none."""
        lanes: dict[str, tuple[Controls | None, Any]] = {}
        if compare == PLAIN and question:
            lanes[PLAIN] = None, None
        elif compare == CONTROL and question:
            if not self.engine.scales:
                raise UserError("this model scales all pictures to one size; compare with the plain model or a method")
            lanes[CONTROL] = None, None
        elif compare not in (PLAIN, NOTHING, CONTROL):
            other = replace(controls, method=compare)
            lanes["other"] = other, self.engine.plan(other)
        return {**lanes, "merged": (controls, self.engine.plan(controls))}

    def _check_room(self, turns: list[Turn]) -> None:
        count = sum(len(turn.pictures) for turn in turns)
        if not count:
            raise UserError("add a picture first")
        if count > MAX_PICTURES or len(turns) > MAX_TURNS:
            raise UserError(
                f"a conversation holds {MAX_PICTURES} pictures and {MAX_TURNS} turns, this would be {count} and "
                f"{len(turns)}; clear it"
            )
        if not turns[-1].question and not turns[-1].pictures:
            raise UserError("the question is empty; ask something, or add a picture to look inside")

    def _run(
        self, turns: list[Turn], lane: str, controls: Controls | None, plan: Any, merged: Controls
    ) -> Iterator[Event]:
        """The events of one run; what cannot be asked is refused before the first of them.

        ``merged`` are the settings that smaller pictures have as many tokens as.
        """
        engine, stop, title = self.engine, self._stop, turns[-1].replies[lane].label
        if not turns[-1].question:
            return look_only(engine, turns[-1].pictures, plan, controls, title, stop)
        said, pictures = history(turns, lane)
        images = [picture.image for picture in pictures]
        inputs, room = engine.prepare(encode, engine, turns[-1].question, said, images, plan)
        full = None
        if lane == CONTROL:
            full, (inputs, _) = inputs, engine.prepare(engine.encode_smaller, said, images, merged)
            inputs = inputs.to(engine.model.device, dtype=engine.model.dtype)
        return answer(engine, inputs, room, pictures, controls, title, stop, full)

    def _write(self, turn: Turn, lane: str, events: Iterator[Event]) -> Iterator[Turn]:
        reply = turn.replies[lane]
        for event in events:
            reply.ahead = event.ahead
            if event.text:
                reply.text, reply.state = (reply.text + event.text).lstrip(), "writing"
            if event.result is not None:
                reply.text, reply.looks, reply.figures = reply.text.strip(), event.result.looks, event.result.figures
                asked = turn.replies.get(PLAIN)
                reply.plain = event.result.plain if asked is None or asked.figures is None else asked.figures
                reply.state = "stopped" if self._stop.is_set() else "done"
            yield turn
