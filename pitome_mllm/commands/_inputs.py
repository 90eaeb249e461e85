"""From what the user gave to what the model takes: the image, the question, the prompt and its checks."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import UserError
from ..serving import prompts
from ..serving.resolution import smaller, without_floor
from ..serving.uploads import decode
from ._companion import companion


@dataclass(frozen=True)
class Subject:
    """An image, what it is called, a question with its true answer (None: not known), and others about it."""

    picture: Image.Image
    name: str
    question: str | None = None
    truth: str | None = None
    examples: tuple[str, ...] = ()


def read_subject(options: argparse.Namespace) -> Subject:
    """The image and question that the command line names; without any, held-out test scene 0."""
    picture, takes_question = options.picture, hasattr(options, "question")
    question = options.question if takes_question else None
    if options.scene is not None:
        if picture is not None and (question is not None or not takes_question):  # else it is the question
            raise UserError(f"got the picture {picture!r} and --scene {options.scene}; give one of them")
        return _scene(options.scene, question=picture)
    if picture is None:
        return _scene(0)
    return Subject(read_picture(picture), picture, question)


def _scene(number: int, question: str | None = None) -> Subject:
    """A held-out test scene with its first question, or with another one."""
    picture, questions = companion("eval", "benchmark.sets").scene(number, split="test")
    if question is None:
        asked, truth = questions[0].text, questions[0].answer
    else:
        asked = question
        truth = next((q.answer for q in questions if q.text.lower() == question.strip().lower()), None)
    return Subject(picture, f"test scene {number}", asked, truth, tuple(q.text for q in questions[:3]))


def read_picture(path: str | Path) -> Image.Image:
    """An image file as RGB, turned as its camera says, transparency on white."""
    if not Path(path).is_file():
        hint = f"; to ask about a scene: pitome-mllm ask --scene 0 {str(path)!r}" if " " in str(path).strip() else ""
        raise UserError(f"no picture file {str(path)!r}{hint}")
    return decode(path, str(path))


def encode(model: Any, processor: Any, subject: Subject, question: str, new_tokens: int) -> Any:
    """Model inputs for one image and one question, on the model's device."""
    prompts.check_question(processor, question, subject.examples)
    inputs, _ = prompts.encode(model, processor, [prompts.message(question, 1)], [subject.picture], new_tokens)
    return inputs.to(model.device, dtype=model.dtype)


def encode_smaller(model: Any, processor: Any, subject: Subject, new_tokens: int, tokens: int) -> Any:
    """As `encode`, with the picture scaled down to about so many visual ``tokens``."""
    seen = replace(subject, picture=smaller(processor, subject.picture, tokens))
    return encode(model, without_floor(processor), seen, str(seen.question), new_tokens)
