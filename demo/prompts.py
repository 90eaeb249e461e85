"""From a conversation to what the model takes."""

from __future__ import annotations

from typing import Any

from pitome_mllm.methods import UserError
from pitome_mllm.serving.prompts import Message, check_question, write

NEW_TOKENS = 256  # longest answer where the model sets no limit of its own


def encode(engine: Any, question: str, said: list[Message], images: list[Any], plan: Any) -> tuple[Any, int]:
    """Model inputs on the model's device, and how many new tokens the answer may have; no plan = the plain model."""
    model, processor = engine.model, engine.processor
    check_question(processor, question)
    inputs = processor(images=images, text=write(processor, said), return_tensors="pt")
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
