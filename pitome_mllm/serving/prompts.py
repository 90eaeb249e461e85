"""From questions and images to a prompt: the one way of command line, chat and benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..methods import UserError

PUNCTUATION = ".,;:!?\"'()"
Message = Mapping[str, Any]  # "role", and as "content" parts {"type": "image"} or {"type": "text", "text": ...}


def message(text: str, pictures: int = 0, role: str = "user") -> Message:
    """One turn: so many images, and a text."""
    return {"role": role, "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}


def write(processor: Any, messages: Sequence[Message], system: str = "") -> str:
    """The text of a conversation as the model was trained on it, up to where its answer begins.

    Processors without a chat template get the words of LLaVA-1.5.

    Parameters
    ----------
    messages : sequence of Message
        Turns of "user" and "assistant".
    system : str, default ''
        Said before all of them.
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


def check_question(processor: Any, question: str) -> None:
    """Refuse an empty question, one with the image's placeholder, and words the tokenizer does not know."""
    if not question.strip():
        raise UserError("the question is empty; ask something about the picture")
    if processor.image_token in question:
        raise UserError(f"the question holds {processor.image_token!r}, which stands for the picture; leave it out")
    unknown = unknown_words(processor.tokenizer, question)
    if unknown:
        words = sorted(filter(str.isalnum, processor.tokenizer.get_vocab()))
        known = f"; it knows {len(words)} words: {' '.join(words)}" if len(words) < 200 else ""
        raise UserError(f"the model does not know {', '.join(map(repr, unknown))}{known}")


def unknown_words(tokenizer: Any, text: str) -> list[str]:
    """The words of ``text`` that become the unknown token, each once, in order."""
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return []
    words = dict.fromkeys(word.strip(PUNCTUATION) or word for word in text.split())
    return [word for word in words if unknown in tokenizer(word, add_special_tokens=False)["input_ids"]]
