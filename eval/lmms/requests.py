"""From lmms-eval's requests to prompts, images and options of ``generate``, and back to its results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult
from PIL import Image

from pitome_mllm.methods import UserError
from pitome_mllm.serving.prompts import write

from .results import EvaluationError

NEW_TOKENS = 1024  # where a task sets no limit, as lmms-eval's own LLaVA has it
PADDING = "__padding_only__"  # lmms-eval's mark of requests that only fill up a process's share
SAMPLING = ("temperature", "top_p", "top_k")
TAKEN = ("max_new_tokens", "num_beams", "repetition_penalty", *SAMPLING)
# What tasks say to other models, or to lmms-eval itself.
NOT_OURS = ("do_sample", "until", "stop_sequences", "image_aspect_ratio", "max_agentic_steps", "skip_special_tokens")


@dataclass(frozen=True)
class Asked:
    """One request."""

    messages: Sequence[Mapping[str, Any]]  # of every turn, as chat templates take them, without the images themselves
    images: Sequence[Image.Image]  # in the order of their placeholders
    options: Mapping[str, Any]  # lmms-eval's, of generation
    continuation: str = ""  # the text whose likelihood is asked for; empty where an answer is
    padding: bool = False  # only there to fill up a process's share


@contextmanager
def naming(requests: Sequence[Any]) -> Iterator[None]:
    """Turn whatever is raised inside into an EvaluationError that names task and documents."""
    try:
        yield
    except Exception as error:
        known = [request.args[-3:-1] for request in requests if len(request.args) > 3]  # document and task
        documents = ", ".join(str(document) for document, _ in known)
        place = f"task {known[0][1]}, document {documents}" if known else "a request without document"
        what = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise EvaluationError(f"{place}: {what}{error}") from error


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


def continuation(request: Any, documents: Mapping[str, Any]) -> Asked:
    """A request (context, continuation or doc_to_target, doc_to_visual, document, task, split)."""
    if len(request.args) != 6:  # as the metric acc_mutual_info makes them
        raise UserError(f"got {len(request.args)} arguments; likelihoods without a document are not supported")
    context, said, doc_to_visual = request.args[:3]
    found = document(request, documents)
    said = said(found) if callable(said) else said
    return _asked(_one_turn(context, doc_to_visual(found)), request, continuation=str(said).strip())


def _one_turn(text: str, visuals: Sequence[Any] | None) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": visual} for visual in visuals or ()]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def _asked(turns: Sequence[Mapping[str, Any]], request: Any, **more: Any) -> Asked:
    """Take the images out of the turns."""
    messages, images = [], []
    for turn in turns:
        parts = turn["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        images += [_image(part) for part in parts if part["type"] != "text"]
        content = [part if part["type"] == "text" else {"type": "image"} for part in parts]
        messages.append({"role": turn["role"], "content": content})
    return Asked(messages, images, **{"options": {}, **more}, padding=bool(request.metadata.get(PADDING)))


def _image(part: Mapping[str, Any]) -> Image.Image:
    visual = part.get("url", part.get("image"))
    if part["type"] != "image" or not isinstance(visual, Image.Image):
        raise UserError(f"got {part['type']} ({type(visual).__name__}); this model takes images and text only")
    return visual.convert("RGB")


def prompt(processor: Any, asked: Asked, system: str = "") -> str:
    """The text around the images that the model was trained on."""
    messages = []
    for message in asked.messages:
        images = sum(part["type"] == "image" for part in message["content"])
        texts = [part for part in message["content"] if part["type"] == "text"]
        inside = sum(part["text"].count(processor.image_token) for part in texts)
        if inside not in (0, images):
            raise UserError(f"the text has {inside} placeholders {processor.image_token!r} for {images} images")
        messages.append({**message, "content": texts} if inside else message)  # it says itself where they stand
    return write(processor, messages, system)


def generation(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Keywords of ``generate``, and the texts that end an answer."""
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


class LazyResults(Sequence):
    """Answers that are made when they are asked for, in order."""

    def __init__(self, coming: Iterator[Any], total: int) -> None:
        self._coming, self._total, self._known = coming, total, []

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]

    def __iter__(self) -> Iterator[Any]:
        for number in range(self._total):
            if number == len(self._known):
                self._known.append(next(self._coming))
            yield self._known[number]


class Likelihood(tuple):
    """(loss, greedy) of a continuation."""

    def strip(self) -> str:
        """Called by lmms-eval's response cache, which takes it for a text and would give a string back."""
        raise EvaluationError("lmms-eval's response cache cannot hold likelihoods; run these tasks without it")


def likelihood(scores: torch.Tensor, ids: torch.Tensor) -> GenerationResult:
    """Of ids (n,) under scores (n, V): mean negative log-likelihood, and whether each is the best."""
    loss = torch.nn.functional.cross_entropy(scores, ids)
    return GenerationResult(Likelihood((float(loss), bool((scores.argmax(-1) == ids).all()))))
