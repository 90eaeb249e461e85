"""What was said: questions, pictures, and replies with their settings and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pitome_mllm.costs.answer import AnswerCost
from pitome_mllm.serving.prompts import Message, message

from .controls import Controls
from .look import Look
from .pictures import Picture


@dataclass
class Reply:
    """One model's answer in a turn."""

    label: str  # the settings it was asked with, in words
    controls: Controls | None  # these settings; None = the plain model
    model: str
    text: str = ""
    state: str = "waiting"  # then "writing", "done" or "stopped"
    ahead: int = 0  # runs of others before this one, while it waits
    figures: AnswerCost | None = None
    plain: AnswerCost | None = None  # what the plain model would cost or, where it was asked too, did cost
    looks: tuple[Look, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """What a client gets to read; pictures left out."""
        return {
            "model": self.model,
            "label": self.label,
            "settings": None if self.controls is None else asdict(self.controls),
            "answer": self.text,
            "state": self.state,
            "figures": None if self.figures is None else asdict(self.figures),
            "of_plain": {} if self.figures is None else self.figures.over(self.plain),
        }


@dataclass
class Turn:
    """A question ("" = only look), its pictures, and the replies by lane: "plain" or "other", "merged"."""

    question: str
    pictures: list[Picture]
    replies: dict[str, Reply] = field(default_factory=dict)

    def reply(self, lane: str) -> Reply:
        """The reply that a lane's later turns remember."""
        return self.replies.get(lane) or self.replies["merged"]

    def end(self) -> None:
        """Nothing more is coming: what is not done counts as stopped."""
        for reply in self.replies.values():
            if reply.state != "done":
                reply.state = "stopped"

    def forget_looks(self) -> None:
        for reply in self.replies.values():
            reply.looks = ()

    def to_dict(self) -> dict[str, Any]:
        pictures = [{"name": p.name, "width": p.image.width, "height": p.image.height} for p in self.pictures]
        replies = {lane: reply.to_dict() for lane, reply in self.replies.items()}
        return {"question": self.question, "pictures": pictures, "replies": replies}


def history(turns: Sequence[Turn], lane: str) -> tuple[list[Message], list[Picture]]:
    """What a lane's model reads: every question with its answer, and all pictures.

    Pictures that were only looked at come with the next question. A stopped answer counts as far as it got.
    """
    said, pictures, waiting = [], [], 0
    for turn in turns:
        pictures += turn.pictures
        waiting += len(turn.pictures)
        if turn.question:
            said.append(message(turn.question, waiting))
            waiting = 0
            if turn is not turns[-1]:
                said.append(message(turn.reply(lane).text, role="assistant"))
    return said, pictures
