"""From questions and images to a prompt: the one way of command line, chat and benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError

PUNCTUATION = ".,;:!?\"'()"
Message = Mapping[str, Any]  # "role", and as "content" parts {"type": "image"} or {"type": "text", "text": ...}


class TooLong(UserError):
    """A conversation that the model has no room for."""


def message(text: str, pictures: int = 0, role: str = "user") -> Message:
    """One turn: so many images, and a text."""
    return {"role": role, "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}


def write(processor: Any, messages: Sequence[Message], system: str = "") -> str:
    """The text of a conversation as the model was trained on it, up to where its answer begins.

    Processors without a chat template get the words of LLaVA-1.5; ``system`` is said before all turns.
    """
    if getattr(processor, "chat_template", None):
        first = [message(system, role="system")] if system else []
        return processor.apply_chat_template([*first, *messages], add_generation_prompt=True)
    said = [system] if system else []
    for turn in messages:
        text = "".join(
            part["text"] if part["type"] == "text" else f"{processor.image_token}\n" for part in turn["content"]
        )
        said.append(f"{text}</s>" if turn["role"] == "assistant" else f"USER: {text} ASSISTANT:")
    return " ".join(said)


def begins_bare(processor: Any) -> bool:
    """Whether conversations as `write` has them lack the token that the tokenizer begins texts with."""
    tokenizer = processor.tokenizer
    begin, ids = tokenizer.bos_token, tokenizer("").input_ids
    return tokenizer.bos_token_id in ids and not write(processor, [message("")]).startswith(begin)


def encode(
    model: Any, processor: Any, messages: Sequence[Message], images: Sequence[Any], new_tokens: int, plan: Any = None
) -> tuple[Any, int]:
    """Inputs of a conversation, and how many new tokens there is room for: ``new_tokens`` at least.

    Positions that are told of nothing count what the LLM reads under ``plan`` (None: the plain model), which with tiles
    is known behind the tower only.
    """
    inputs = tokenized(processor, [write(processor, messages)], [images])
    length, most = inputs["input_ids"].shape[1], model.config.get_text_config().max_position_embeddings
    if plan is not None and plan.calibration == "none" and not plan.geometry.family.tiles:
        length -= len(images) * (plan.available - plan.keep)
    if (room := most - length) < new_tokens:
        advice = f"ask for at most {room} new tokens, or shorten" if room > 0 else "shorten"
        raise TooLong(
            f"the prompt of {length} tokens and {new_tokens} new ones do not fit: the model holds {most}; {advice} "
            "what is said, or keep fewer tokens"
        )
    return inputs, room


def tokenized(processor: Any, texts: Sequence[str], images: Sequence[Sequence[Any]], **options: Any) -> Any:
    """Model inputs of a batch, each text with its images; templates that write the first token get no second one."""
    first = processor.tokenizer.bos_token
    if first and texts[0].startswith(first):
        options["add_special_tokens"] = False
    rows = [list(row) for row in images]  # some processors tell one image from several in a row
    return processor(images=rows if any(rows) else None, text=list(texts), return_tensors="pt", **options)


def tokens_read(model: Any, inputs: Any, stats: Any = None) -> tuple[list[int], list[int]]:
    """Visual tokens, and tokens of all kinds, that the LLM reads of each row of a prompt; ``stats`` of the run that
    merged, None = all that there are.
    """
    marked = inputs["input_ids"] == model.config.image_token_id, inputs["attention_mask"].bool()
    visual, read = (columns.sum(1).tolist() if stats is None else stats.left(columns) for columns in marked)
    return visual, read


def check_question(processor: Any, question: str, examples: Sequence[str] = ()) -> None:
    """Refuse an empty question, one with the image's placeholder, and words the tokenizer does not know.

    ``examples`` are questions that the embedded model can answer about this image.
    """
    if not question.strip():
        raise UserError("the question is empty; ask something about the picture")
    if found := mark_of_pictures(processor, question):
        raise UserError(f"the question holds {found!r}, which stands for the picture; leave it out")
    unknown = unknown_words(processor.tokenizer, question)
    if unknown:
        said = what_it_answers(processor.tokenizer, examples)
        raise UserError(f"the model does not know {', '.join(map(repr, unknown))}{said and '; '}{said}")


def mark_of_pictures(processor: Any, text: str) -> str:
    """What stands for a picture, or for a part of one, in a text that should hold no such; '' if it holds none."""
    inside = processor.tokenizer.convert_ids_to_tokens([i for i in _image_token_ids(processor) if i is not None])
    return next((mark for mark in (processor.image_token, *inside) if mark in text), "")


def _image_token_ids(processor: Any) -> Sequence[int | None]:
    """The tokens that a processor writes in the place of a picture."""
    return getattr(processor, "image_token_ids", (getattr(processor, "image_token_id", None),))


def what_it_answers(tokenizer: Any, examples: Sequence[str] = ()) -> str:
    """What the embedded model is for, three questions for it, and where to turn with others; '' of other models."""
    if not hasattr(tokenizer, "purpose"):
        return ""
    said = ", ".join(map(repr, (examples or tokenizer.examples)[:3]))
    return f"{tokenizer.purpose}, such as {said}; for others choose another --model, such as llava-hf/llava-1.5-7b-hf"


def unknown_words(tokenizer: Any, text: str) -> list[str]:
    """The words of ``text`` that become the unknown token, each once, in order."""
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return []
    words = dict.fromkeys(word.strip(PUNCTUATION) or word for word in text.split())
    return [word for word in words if unknown in tokenizer.convert_tokens_to_ids(tokenizer.tokenize(word))]
