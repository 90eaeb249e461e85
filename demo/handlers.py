"""What the parts of the page do when they are used: from their values to what they show next.

Every function gets Gradio's ``request`` first, whose session tells the visitor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import gradio as gr

from pitome_mllm.methods import UserError

from . import charts, view
from .belongings import Belongings
from .controls import AMOUNTS, Controls, describe
from .engine import Engine
from .look import Look
from .session import Conversation
from .visitors import Visitors

LEGEND = (
    "What shares an outline became one token; a dot is a patch that stayed alone, a diamond one that the method "
    "protects. Click on a patch to light up everything that shares its token."
)
QUIET = gr.update(value="", visible=False)  # the line for mistakes, when there is none


class Handlers:
    """For one page; ``belongings`` are the files of its visitors."""

    def __init__(self, engine: Engine, belongings: Belongings) -> None:
        self.belongings = belongings
        self.visitors = Visitors(engine, farewell=belongings.drop)

    def of(self, request: gr.Request) -> Conversation:
        try:
            return self.visitors.of(request.session_hash)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def leave(self, request: gr.Request) -> None:
        self.visitors.leave(request.session_hash)

    def send(self, request: gr.Request, box: dict[str, Any], *values: Any) -> Iterator[Any]:
        """Ask; the question goes back into the box if it cannot be asked."""
        *values, compare = values
        chat = self.of(request)
        self.belongings.add(request.session_hash, box["files"])
        emptied = None  # once: meanwhile the visitor may write the next question
        try:
            for _ in chat.ask(box["text"] or "", box["files"], _controls(*values), compare):
                yield view.messages(chat.turns), QUIET, emptied
                emptied = gr.skip()
        except UserError as error:
            yield view.messages(chat.turns), _loud(str(error)), box

    def ask_again(self, request: gr.Request, *values: Any) -> Iterator[Any]:
        *values, compare = values
        chat = self.of(request)
        try:
            for _ in chat.retry(_controls(*values), compare):
                yield view.messages(chat.turns), QUIET, gr.skip()
        except UserError as error:
            yield view.messages(chat.turns), _loud(str(error)), gr.skip()

    def end(self, request: gr.Request) -> None:
        self.of(request).stop()

    def forget(self, request: gr.Request) -> tuple[Any, ...]:
        self.of(request).clear()
        return [], QUIET, None

    def tidy(self, request: gr.Request) -> None:
        """Delete the files of a conversation that was cleared, once the page shows none of them any more."""
        if not self.of(request).turns:
            self.belongings.drop(request.session_hash)

    def write_json(self, request: gr.Request) -> str:
        path = self.belongings.path(request.session_hash, "conversation.json")
        path.write_text(json.dumps(self.of(request).to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return str(path)

    def snap(self, box: dict[str, Any], photo: str | None) -> tuple[Any, ...]:
        """A webcam's picture goes to the others in the box."""
        if photo is None:
            return gr.skip(), gr.skip()
        return {"text": box["text"], "files": [*box["files"], photo]}, None

    def show_plan(self, request: gr.Request, *values: Any) -> tuple[Any, ...]:
        """What the settings come to, or why they cannot be, and what the benchmark says about them."""
        engine, by_tokens = self.of(request).engine, values[1] == AMOUNTS[0]
        sliders = gr.update(visible=by_tokens), gr.update(visible=not by_tokens)
        try:
            plan = engine.plan(_controls(*values))
        except UserError as error:
            return view.notice(str(error)), gr.skip(), *sliders
        return f'<div class="pm-plan">{describe(plan)}</div>', _accuracy(engine.name, plan, by_tokens), *sliders

    def show_model(self, request: gr.Request) -> str:
        engine = self.of(request).engine
        return f'<div class="pm-plan">{view.text(engine.name)}: {engine.available} visual tokens per picture</div>'

    # looking inside

    def newest_look(self, request: gr.Request) -> tuple[Any, ...]:
        """The list of pictures to look into, and the last one of the last turn."""
        found = _looks(self.of(request))
        choices = [
            (f"{turn + 1}. {look.name} · {look.title.split(' tokens')[0]}", f"{turn}/{number}")
            for turn, number, look in found
        ]
        value = choices[-1][1] if choices else None
        shown = gr.update(choices=choices, value=value), *self.show_look(request, value)
        if _looks(self.of(request)) != found:  # cleared or asked again while this was drawn
            return tuple(gr.skip() for _ in shown)
        return shown

    def _look(self, request: gr.Request, value: str | None) -> Look | None:
        return next((look for t, n, look in _looks(self.of(request)) if f"{t}/{n}" == value), None)

    def show_look(self, request: gr.Request, value: str | None) -> tuple[Any, ...]:
        look = self._look(request, value)
        if look is None:
            return None, "", gr.update(visible=False), None, "", ""
        try:
            groups = self._drawn(request, look.draw())
            picked = _note(LEGEND + (" Hatched patches were dropped." if (look.groups < 0).any() else ""))
        except UserError as error:
            groups, picked = None, view.notice(str(error), "info")
        steps = look.energy_steps
        first = steps[0] if steps else 0
        slider = gr.update(visible=len(steps) > 1, minimum=first, maximum=max([first + 1, *steps]), value=first)
        title = _note(f"{look.name}: patch tokens after every merge")
        return groups, picked, slider, *self.show_energy(request, value, first), title + charts.bars(look)

    def show_energy(self, request: gr.Request, value: str | None, step: int) -> tuple[Any, ...]:
        look = self._look(request, value)
        if look is None:
            return None, ""
        try:
            drawing, text = look.draw_energy(int(step))
        except UserError as error:
            return None, view.notice(str(error), "info")
        return self._drawn(request, drawing), _note(f"{text}. High energy (yellow): many alike, merged first.")

    def pick(self, request: gr.Request, value: str | None, event: gr.SelectData) -> tuple[Any, ...]:
        """Light up the group under a click."""
        look = self._look(request, value)
        if look is None:
            return gr.skip(), gr.skip()
        whole = look.draw()
        group = look.pick(event.index[0] / whole.width, event.index[1] / whole.height)
        if group is None:
            return self._drawn(request, whole), _note("This patch was dropped; it belongs to no token.")
        return self._drawn(request, look.draw(group)), f'<div class="pm-plan">{view.text(look.describe(group))}</div>'

    def _drawn(self, request: gr.Request, image: Any) -> str | None:
        return self.belongings.drawing(request.session_hash, image)

    # for gradio_client

    def api_ask(self, request: gr.Request, question: str, picture: str | None, *values: Any) -> Iterator[Any]:
        """Ask in this client's conversation; yields the turn as JSON while it is written.

        picture: a file, or None to go on with the pictures so far.
        """
        *values, compare = values
        files = [picture] if picture else []
        chat = self.of(request)
        self.belongings.add(request.session_hash, files)
        try:
            for turn in chat.ask(question, files, _controls(*values), compare):
                yield turn.to_dict()
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def api_conversation(self, request: gr.Request) -> dict[str, Any]:
        """This client's conversation so far, as JSON."""
        return self.of(request).to_dict()


def _controls(*values: Any) -> Controls:
    """From what the page's controls hold, in the order of `Controls`."""
    return Controls.of({field.name: value for field, value in zip(fields(Controls), values, strict=True)})


def _looks(chat: Conversation) -> list[tuple[int, int, Look]]:
    """Turn, number and look of every picture that can be looked into."""
    merged = [(number, turn.replies["merged"].looks) for number, turn in enumerate(list(chat.turns))]
    return [(turn, number, look) for turn, looks in merged for number, look in enumerate(looks)]


def _accuracy(model: str, plan: Any, by_tokens: bool) -> str:
    found = charts.curve(plan.method, plan.where, plan.published)
    if found is None:
        return _note(f"{plan.method} was not measured with where={plan.where}.")
    text = f"{plan.method}, {plan.where}: right answers of the embedded model ({found.about}). {found.at(plan.keep)}"
    text += "" if by_tokens else ". Measured with a number of tokens, not with a ratio"
    text += "" if model == "tiny" else f". Nothing was measured for {model}"
    return charts.accuracy(found, plan.keep) + _note(f"{text}. Bars: 95% intervals. Dashed: the plain model.")


def _loud(words: str, kind: str = "error") -> Any:
    return gr.update(value=view.notice(words, kind), visible=True)


def _note(words: str) -> str:
    return f'<div class="pm-note">{view.text(words)}</div>'
