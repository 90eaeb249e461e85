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
from .controls import PLACES, Controls, describe
from .engine import Engine
from .look import Look
from .pictures import Picture
from .session import Conversation
from .visitors import Visitors

LEGEND = (
    "What shares an outline became one token; a dot is a patch that stayed alone, a diamond one that the method "
    "protects. Click on a patch, or move the slider, to light up one token."
)
QUIET = gr.update(value="", visible=False)  # the line for mistakes, when there is none
NOW = "now"  # of the pictures to look into, the one merged as the settings are


class Handlers:
    """For one page; ``first`` is the picture that it opens with."""

    def __init__(self, engine: Engine, first: Picture) -> None:
        self.first = first
        self.visitors = Visitors(engine)

    def of(self, request: gr.Request) -> Conversation:
        try:
            return self.visitors.of(request.session_hash)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def leave(self, request: gr.Request) -> None:
        self.visitors.leave(request.session_hash)

    def send(self, request: gr.Request, box: dict[str, Any], *values: Any, anew: bool = False) -> Iterator[Any]:
        """Ask; the question goes back into the box if it cannot be asked."""
        *values, compare = values
        chat = self.of(request)
        emptied = None  # once: meanwhile the visitor may write the next question
        try:
            for _ in chat.ask(box["text"] or "", box["files"], self._controls(values), compare, anew):
                yield view.messages(chat.turns), QUIET, emptied
                emptied = gr.skip()
        except UserError as error:
            yield view.messages(chat.turns), gr.update(value=view.notice(str(error)), visible=True), box

    def begin(self, request: gr.Request, box: dict[str, Any], *values: Any) -> Iterator[Any]:
        """An example: it is asked in a new conversation."""
        yield from self.send(request, box, *values, anew=True)

    def ask_again(self, request: gr.Request, *values: Any) -> Iterator[Any]:
        *values, compare = values
        chat = self.of(request)
        try:
            for _ in chat.retry(self._controls(values), compare):
                yield view.messages(chat.turns), QUIET, gr.skip()
        except UserError as error:
            yield view.messages(chat.turns), gr.update(value=view.notice(str(error)), visible=True), gr.skip()

    def end(self, request: gr.Request) -> None:
        self.of(request).stop()

    def forget(self, request: gr.Request) -> tuple[Any, ...]:
        self.of(request).clear()
        return [], QUIET, None

    def to_json(self, request: gr.Request) -> str:
        return json.dumps(self.of(request).to_dict(), indent=1, ensure_ascii=False) + "\n"

    def snap(self, box: dict[str, Any], photo: str | None) -> tuple[Any, ...]:
        """A webcam's picture goes to the others in the box."""
        if photo is None:
            return gr.skip(), gr.skip()
        return {"text": box["text"], "files": [*box["files"], photo]}, None

    def show_plan(self, request: gr.Request, *values: Any) -> tuple[Any, ...]:
        """What the settings come to, or why they cannot be, and what the benchmark says about them."""
        engine, by_tokens = self.of(request).engine, values[1] != "ratio"
        sliders = gr.update(visible=by_tokens), gr.update(visible=not by_tokens)
        try:
            plan = engine.plan(self._controls(values))
        except UserError as error:
            return view.notice(str(error)), gr.skip(), *sliders
        return f'<div class="pm-plan">{describe(plan)}</div>', _accuracy(engine.name, plan, by_tokens), *sliders

    def show_model(self, request: gr.Request) -> str:
        engine = self.of(request).engine
        many = engine.available or "as many"
        suffix = "" if engine.available else " as its size asks for"
        about = f"{engine.name} makes {many} visual tokens of a picture{suffix}. {engine.burden}"
        return f'<div class="pm-note"><b>What decides the cost:</b> {view.text(about)}</div>'

    # looking inside

    def newest_look(self, request: gr.Request) -> tuple[Any, ...]:
        """The list of pictures to look into, and the last one of the last turn."""
        chat = self.of(request)
        found = _looks(chat)
        if not found:
            return gr.skip()
        shown = _choices(chat, [*found][-1]), *self.show_groups(request, [*found][-1])
        return shown if _looks(chat) == found else gr.skip()  # cleared or asked again while this was drawn

    def redraw(self, request: gr.Request, value: str, *values: Any) -> tuple[Any, ...]:
        """The picture that is looked into, merged anew as the settings are now."""
        chat, look = self.of(request), self._look(request, value)
        try:
            controls = self._controls(values)
            chat.engine.plan(controls)
        except UserError:  # `show_plan` says it
            return gr.skip()
        try:
            chat.live = chat.preview(self.first if look is None else look.picture, controls)
        except UserError as error:
            return gr.skip(), None, gr.update(visible=False), view.notice(str(error), "info")
        return _choices(chat, NOW), *self.show_groups(request, NOW)

    def _look(self, request: gr.Request, value: str | None) -> Look | None:
        chat = self.of(request)
        return chat.live if value == NOW else _looks(chat).get(value or "")

    def show_groups(self, request: gr.Request, value: str | None) -> tuple[Any, ...]:
        look = self._look(request, value)
        if look is None:
            return None, gr.update(visible=False), ""
        try:
            groups, most = look.draw(), int(look.groups.max())
        except UserError as error:
            return None, gr.update(visible=False), view.notice(str(error), "info")
        words = LEGEND + (" Hatched patches were dropped." if (look.groups < 0).any() else "")
        return groups, gr.update(visible=most > 0, maximum=max(most, 1), value=0), _note(words)

    def show_steps(self, request: gr.Request, value: str | None) -> tuple[Any, ...]:
        """What the tabs beside the groups show."""
        look = self._look(request, value)
        if look is None:
            return gr.update(visible=False), None, "", ""
        steps = look.energy_steps
        first = steps[0] if steps else 0
        slider = gr.update(visible=len(steps) > 1, minimum=first, maximum=max([first + 1, *steps]), value=first)
        title = _note(f"{look.name}: patch tokens after every merge")
        return slider, *self.show_energy(request, value, first), title + charts.bars(look)

    def show_energy(self, request: gr.Request, value: str | None, step: float | None) -> tuple[Any, ...]:
        look = self._look(request, value)
        if look is None or step is None:
            return gr.skip()
        try:
            drawing, text = look.draw_energy(int(step))
        except UserError as error:
            return None, view.notice(str(error), "info")
        return drawing, _note(f"{text}. High energy (yellow): many alike, merged first.")

    def pick(self, request: gr.Request, value: str | None, event: gr.SelectData) -> tuple[Any, ...]:
        """Light up the token under a click."""
        look = self._look(request, value)
        if look is None:
            return gr.skip()
        whole = look.draw()
        group = look.pick(event.index[0] / whole.width, event.index[1] / whole.height)
        if group is None:
            return whole, _note("This patch was dropped; it belongs to no token."), gr.skip()
        return *self.light(request, value, group), group

    def light(self, request: gr.Request, value: str | None, group: float | None) -> tuple[Any, ...]:
        """Light up a token."""
        look = self._look(request, value)
        if look is None or group is None:
            return gr.skip()
        try:
            return look.draw(int(group)), f'<div class="pm-plan">{view.text(look.describe(int(group)))}</div>'
        except UserError as error:
            return gr.skip(), view.notice(str(error), "info")

    # for gradio_client

    def api_ask(self, request: gr.Request, question: str, picture: str | None, *values: Any) -> Iterator[Any]:
        """Ask in this client's conversation; yields the turn as JSON while it is written.

        picture: a file, or None to go on with the pictures so far. compare: "nothing", "plain", or a method.
        """
        *values, compare = values
        try:
            for turn in self.of(request).ask(question, [picture] if picture else [], self._controls(values), compare):
                yield turn.to_dict()
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def api_conversation(self, request: gr.Request) -> dict[str, Any]:
        """This client's conversation so far, as JSON."""
        return self.of(request).to_dict()

    def _controls(self, values: Any) -> Controls:
        """From what the page's controls hold, in the order of `Controls`."""
        named = {field.name: value for field, value in zip(fields(Controls), values, strict=True)}
        return Controls.of(named, self.visitors.engine.available)


def _looks(chat: Conversation) -> dict[str, Look]:
    """Every picture of the turns that can be looked into, by turn, lane and number."""
    return {
        f"{number}/{lane}/{place}": look
        for number, turn in enumerate(list(chat.turns))
        for lane, reply in list(turn.replies.items())
        for place, look in enumerate(reply.looks)
    }


def _choices(chat: Conversation, value: str) -> Any:
    named = {name: f"{int(name.split('/')[0]) + 1}. {_title(look)}" for name, look in _looks(chat).items()}
    if chat.live is not None:
        named = {NOW: f"As set above: {_title(chat.live)}", **named}
    return gr.update(choices=[(title, name) for name, title in named.items()], value=value)


def _title(look: Look) -> str:
    return f"{look.name} · {look.title.split(' tokens')[0]}"


def _accuracy(model: str, plan: Any, by_tokens: bool) -> str:
    found = charts.curve(plan.method, plan.where, plan.published)
    if found is None:
        return _note(f"{plan.method} was not measured {PLACES[plan.where]} with these settings.")
    text = f"{found.name}: right answers of the embedded model ({found.about}). {found.at(plan.keep)}"
    text += "" if by_tokens else ". Measured with a number of tokens, not with a ratio"
    text += "" if model == "tiny" else f". Nothing was measured for {model}"
    return charts.accuracy(found, plan.keep) + _note(f"{text}. Bars: 95% intervals. Dashed: the plain model.")


def _note(words: str) -> str:
    return f'<div class="pm-note">{view.text(words)}</div>'
