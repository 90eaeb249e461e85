"""generate() on a shorter prompt: what counts the caller's prompt or sees it goes on doing so."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import UserError
from .arguments import GENERATING
from .call import named
from .layout import restore_prompt
from .prompt import rewrite, tell
from .state import Attached
from .validate import check_chunks


def generate(model: nn.Module, plain: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """``plain`` generate on the shortened prompt; the answer starts with the caller's own prompt."""
    handle = model._pitome
    kwargs = named(type(model).generate, args, kwargs)
    inputs = kwargs.pop("inputs", None)
    if inputs is not None:
        kwargs["input_ids"] = inputs
    outer = GENERATING.get()
    try:
        handle.forget_encoded()
        with torch.no_grad():
            call = rewrite(handle, kwargs, whole=True)
        if call is None:
            return plain(**kwargs)
        short = {**call.kwargs, **_callbacks(handle, kwargs, _width(call.kwargs))}
        if call.layout is not None:
            check_chunks(model, _option(model, kwargs, "prefill_chunk_size"), _width(short))
            short.update(_lengths(model, kwargs, _width(short)))
        GENERATING.set((*outer, handle))
        with handle.choosing(handle.plan, call):  # prompts are short already, and the plan stays what it is
            out = plain(**short)
    finally:
        GENERATING.set(outer)
    if call.layout is None:
        return out
    tell(handle, call.layout)
    sequences = out if isinstance(out, Tensor) else out.sequences
    if kwargs.get("input_ids") is None:  # from embeddings: sequences hold the new ids only
        return out
    sequences = restore_prompt(sequences, kwargs["input_ids"], _width(short))
    if isinstance(out, Tensor):
        return sequences
    out.sequences = sequences
    return out


def _width(kwargs: dict[str, Any]) -> int:
    ids = kwargs.get("input_ids")
    return (kwargs["inputs_embeds"] if ids is None else ids).shape[1]


def _option(model: nn.Module, kwargs: dict[str, Any], name: str) -> Any:
    """What a generate() is asked for by this name, in its arguments or in a configuration; None if nothing is."""
    configs = (kwargs.get("generation_config"), model.generation_config)
    asked = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
    return next((value for value in asked if value is not None), None)


def _lengths(model: nn.Module, kwargs: dict[str, Any], short: int) -> dict[str, int]:
    """max_length and min_length, which count the caller's prompt, for a prompt of ``short`` columns."""
    width, fitted = _width(kwargs), {}
    for name, new_tokens in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if _option(model, kwargs, new_tokens) is not None:
            continue  # counts new tokens only, and takes precedence
        length = _option(model, kwargs, name)
        if name == "max_length" and length is not None and length <= width:
            raise UserError(
                f"max_length={length} leaves no room behind a prompt of {width} tokens; give max_new_tokens"
            )
        if length:
            fitted[name] = max(length - width + short, 0)
    return fitted


def _callbacks(handle: Attached, kwargs: dict[str, Any], short: int) -> dict[str, Any]:
    """The caller's stopping criteria and logits processors, made to see the caller's prompt and not the short one.

    They may run the model, too, with prompts and KV caches of their own: those are no part of this generate().
    """
    prompt, wrapped = kwargs.get("input_ids"), {}

    def restored(ids: Tensor, rows: slice = slice(None)) -> Tensor:
        return ids if prompt is None else restore_prompt(ids, prompt[rows], short)  # from embeddings: new ids only

    def seeing(callback: Callable) -> Callable:
        @wraps(callback, assigned=())  # attributes such as eos_token_id, which transformers looks for
        def call(ids: Tensor, scores: Any, **more: Any) -> Any:
            with handle.choosing(handle.plan, outside=True):
                return callback(restored(ids), scores, **more)

        return call

    for name in ("stopping_criteria", "logits_processor"):
        if kwargs.get(name) is not None:
            wrapped[name] = type(kwargs[name])(map(seeing, kwargs[name]))
    allowed = kwargs.get("prefix_allowed_tokens_fn")
    if allowed is not None:

        def allowed_of(row: int, ids: Tensor) -> list[int]:
            with handle.choosing(handle.plan, outside=True):
                return allowed(row, restored(ids[None], slice(row, row + 1))[0])

        wrapped["prefix_allowed_tokens_fn"] = allowed_of
    return wrapped
