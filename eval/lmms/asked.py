"""From lmms-eval's requests to prompts, pictures and options of ``generate``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image

from pitome_mllm.methods import UserError
from pitome_mllm.serving.prompts import write

NEW_TOKENS = 1024  # where a task sets no limit, as lmms-eval's own LLaVA has it
PADDING = "__padding_only__"  # lmms-eval's mark of requests that only fill up a process's share
SAMPLING = ("temperature", "top_p", "top_k")
TAKEN = ("max_new_tokens", "num_beams", "repetition_penalty", *SAMPLING)
# What tasks say to other models, or to lmms-eval itself.
NOT_OURS = ("do_sample", "until", "stop_sequences", "image_aspect_ratio", "max_agentic_steps", "skip_special_tokens")


class EvaluationError(RuntimeError):
    """A question could not be answered; says which."""


@dataclass(frozen=True)
class Asked:
    """One request.

    Attributes
    ----------
    messages : role and content of every turn, as chat templates take them, without the pictures themselves.
    pictures : in the order of their placeholders.
    options : lmms-eval's generation options.
    continuation : the text whose likelihood is asked for; empty where an answer is.
    padding : only there to fill up a process's share.
    """

    messages: Sequence[Mapping[str, Any]]
    pictures: Sequence[Image.Image]
    options: Mapping[str, Any]
    continuation: str = ""
    padding: bool = False


def place(requests: Sequence[Any]) -> str:
    """Task and documents that requests are about; their arguments end with document, task and split."""
    known = [request.args[-3:-1] for request in requests if len(request.args) > 3]
    documents = ", ".join(str(document) for document, _ in known)
    return f"task {known[0][1]}, document {documents}" if known else "a request without document"


@contextmanager
def naming(requests: Sequence[Any]) -> Iterator[None]:
    """Say which documents failed.

    Raises
    ------
    EvaluationError : anything was raised inside.
    """
    try:
        yield
    except UserError as error:
        raise EvaluationError(f"{place(requests)}: {error}") from error
    except Exception as error:
        raise EvaluationError(f"{place(requests)}: {type(error).__name__}: {error}") from error


def document(request: Any, documents: Mapping[str, Any]) -> Any:
    """The document of a request."""
    number, task, split = request.args[-3:]
    return documents[task][split][number]


def simple(request: Any, documents: Mapping[str, Any]) -> Asked:
    """A request (context, options, doc_to_visual, document, task, split)."""
    context, options, doc_to_visual = request.args[:3]
    return _asked(_one_turn(context, doc_to_visual(document(request, documents))), request, options=options)


def chat(request: Any, documents: Mapping[str, Any]) -> Asked:
    """A request (context, doc_to_messages, options, document, task, split)."""
    _, doc_to_messages, options = request.args[:3]
    return _asked(doc_to_messages(document(request, documents)), request, options=options)


def likelihood(request: Any, documents: Mapping[str, Any]) -> Asked:
    """A request (context, continuation or doc_to_target, doc_to_visual, document, task, split).

    Raises
    ------
    ValueError : a request without document, as the metric acc_mutual_info makes them.
    """
    if len(request.args) != 6:
        raise UserError(f"got {len(request.args)} arguments; likelihoods without a document are not supported")
    context, continuation, doc_to_visual = request.args[:3]
    found = document(request, documents)
    if callable(continuation):
        continuation = continuation(found)
    return _asked(_one_turn(context, doc_to_visual(found)), request, continuation=str(continuation).strip())


def _one_turn(text: str, visuals: Sequence[Any] | None) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": visual} for visual in visuals or ()]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def _asked(turns: Sequence[Mapping[str, Any]], request: Any, **more: Any) -> Asked:
    """Take the pictures out of the turns."""
    messages, pictures = [], []
    for turn in turns:
        parts = turn["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        pictures += [_picture(part) for part in parts if part["type"] != "text"]
        content = [part if part["type"] == "text" else {"type": "image"} for part in parts]
        messages.append({"role": turn["role"], "content": content})
    return Asked(messages, pictures, **{"options": {}, **more}, padding=bool(request.metadata.get(PADDING)))


def _picture(part: Mapping[str, Any]) -> Image.Image:
    visual = part.get("url", part.get("image"))
    if part["type"] != "image" or not isinstance(visual, Image.Image):
        raise UserError(f"got {part['type']} ({type(visual).__name__}); this model takes pictures and text only")
    return visual.convert("RGB")


def prompt(processor: Any, asked: Asked, system: str = "") -> str:
    """The text around the pictures that the model was trained on.

    Raises
    ------
    ValueError : a text holds placeholders of its own, but not as many as there are pictures.
    """
    return write(processor, [_inlined(message, processor.image_token) for message in asked.messages], system)


def _inlined(message: Mapping[str, Any], token: str) -> Mapping[str, Any]:
    """The message without its pictures where its text already says where they stand."""
    pictures = sum(part["type"] == "image" for part in message["content"])
    texts = [part for part in message["content"] if part["type"] == "text"]
    inside = sum(part["text"].count(token) for part in texts)
    if inside and inside != pictures:
        raise UserError(f"the text has {inside} placeholders {token!r} for {pictures} pictures")
    return {**message, "content": texts} if inside else message


def generation(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Keywords of ``generate``, and the texts that end an answer.

    Raises
    ------
    ValueError : an option that is not known.
    """
    given = {name: value for name, value in options.items() if value is not None}
    unknown = sorted({*given} - {*TAKEN, *NOT_OURS})
    if unknown:
        raise UserError(f"unknown generation options {', '.join(unknown)}; possible: {', '.join(TAKEN)}, until")
    stops = [given.get("until", []), given.get("stop_sequences", [])]
    until = [text for stop in stops for text in ([stop] if isinstance(stop, str) else stop)]
    sample = given["temperature"] > 0 if "temperature" in given else bool(given.get("do_sample"))
    left_out = () if sample else SAMPLING
    taken = {name: given[name] for name in TAKEN if name in given and name not in left_out}
    return {"max_new_tokens": NEW_TOKENS, "num_beams": 1, **taken, "do_sample": sample}, until


def cut(text: str, until: Sequence[str]) -> str:
    """The answer up to the first of the texts that end it."""
    for stop in filter(None, until):
        text = text.split(stop)[0]
    return text.strip()
