"""From a conversation to what the model takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pitome_mllm.methods import UserError
from pitome_mllm.serving.prompts import Message, check_question, message, write

NEW_TOKENS = 256  # longest answer where the model sets no limit of its own


@dataclass(frozen=True)
class Line:
    """A question with the number of pictures that come with it, and its answer (None: to be written)."""

    pictures: int
    question: str
    answer: str | None = None


def messages(lines: Sequence[Line]) -> Iterator[Message]:
    """Every line as one or two turns."""
    for line in lines:
        yield message(line.question, line.pictures)
        if line.answer is not None:
            yield message(line.answer, role="assistant")


def encode(engine: Any, lines: Sequence[Line], images: Sequence[Any], plan: Any) -> tuple[Any, int]:
    """Model inputs on the model's device, and how many new tokens the answer may have; no plan = the plain model."""
    model, processor = engine.model, engine.processor
    check_question(processor, lines[-1].question)
    inputs = processor(images=list(images), text=write(processor, list(messages(lines))), return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    # Positions that are told of nothing count what the LLM reads, which with tiles is known behind the tower only.
    if plan is not None and plan.calibration == "none" and not plan.geometry.family.tiles:
        length -= len(images) * (plan.available - plan.keep)
    most = model.config.get_text_config().max_position_embeddings
    room = min(most - length, model.generation_config.max_new_tokens or NEW_TOKENS)
    if room < 1:
        raise UserError(
            f"the conversation is too long: {length} tokens with {len(images)} pictures, and the model holds {most}; "
            "clear it, or keep fewer tokens"
        )
    return inputs.to(model.device, dtype=model.dtype), room
