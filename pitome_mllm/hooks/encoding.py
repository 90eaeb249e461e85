"""What a model makes of pictures and videos: encoded before its prompt is shortened, since that says how long it gets.

The model then finds them encoded, once, when it asks; whatever else it encodes merges on the way too.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..families.features import taken
from ..stats import Stats
from . import packed
from .call import CALL, Encoded, named
from .state import Attached
from .validate import check_selection


def lengths(handle: Attached, kwargs: dict[str, Any]) -> tuple[list[int], list[int], Encoded | None]:
    """Visual tokens of every image and frame of a call, of the plain model and as many as it will have, in the order of
    the prompt; and what encoding them gave.
    """
    plan = handle.plan
    if plan is None or plan.is_plain:
        return [-1], [-1], None
    made, stats = {}, {}
    for kind, name in handle.kinds.items():
        if kwargs.get(name) is not None:
            made[kind] = kwargs[name], _encode(handle, kind, kwargs)
            stats[kind] = handle.state.stats
    if len(stats) > 1:
        handle.note(stats=_in_order(handle, kwargs, stats))
    encoded = Encoded(plan, made)
    handle.note(encoded=weakref.ref(encoded))
    pictures = handle.state.stats.packed
    return [len(picture.group) for picture in pictures], [len(picture.token) for picture in pictures], encoded


def _encode(handle: Attached, kind: str, kwargs: dict[str, Any]) -> Any:
    """The model's own encoding of a call's images or videos."""
    name = f"get_{kind}_features"
    given = taken(getattr(type(handle.core), name), kwargs)
    return getattr(handle.core, name)(**given, return_dict=True)


def _in_order(handle: Attached, kwargs: dict[str, Any], stats: dict[str, Stats]) -> Stats:
    """The stats of images and videos as one, in the order in which a prompt has their placeholders."""
    types, config = kwargs.get("mm_token_type_ids"), handle.model.config
    if types is None:
        ids = kwargs["input_ids"]
        types = (ids == config.image_token_id).long() + 2 * (ids == config.video_token_id).long()
    order = [kind - 1 for kind in types.flatten().tolist() if kind in (1, 2)]  # others are of text and of sounds
    units = [list(zip(one.packed, one.grids)) for one in stats.values()]
    full = sum(len(picture.group) for each in units for picture, _ in each)
    whole, order = len(order) >= full, order[-full:]  # what is in a KV cache comes first
    found, at = [], 0
    while at < len(order) and units[order[at]]:
        found.append(units[order[at]].pop(0))
        at += len(found[-1][0].group if whole else found[-1][0].token)
    found += [unit for each in units for unit in each]  # of a prompt that has other placeholders, which is refused
    pictures, grids = zip(*found)
    return replace(stats["image"], images=len(found), packed=pictures, grids=grids)


def make_get_features(core: nn.Module, kind: str) -> Callable[..., Any]:
    """A get_image_features(), or the like, that refuses features that merging is not planned for, hands out encoded
    ones, and merges what is packed.
    """
    own = getattr(type(core), f"get_{kind}_features")

    @functools.wraps(own)
    def get_features(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        handle, plan = self._pitome, self._pitome.plan
        given = {name: value for name, value in named(own, args, kwargs).items() if name != CALL}
        if not torch.compiler.is_compiling():
            check_selection(handle, given)
        if not handle.family.tiles:
            return own(self, **given)
        as_dict = given.pop("return_dict", True)
        encoded = handle.encoded
        output = None if encoded is None else encoded.take(kind, given.get(handle.kinds[kind]), plan)
        if encoded is not None and not encoded.made:
            handle.forget_encoded()
        if output is None and plan is not None and plan.where == "packed":
            with handle.choosing(plan if kind == "image" else None):  # of videos it may call that of images
                output = own(self, **given, return_dict=True)
            output = packed.merge_output(handle, plan, output, given)
        elif output is None:
            output = own(self, **given, return_dict=True)
            if plan is None:
                handle.note(stats=None)
        return output if as_dict else output.to_tuple()

    return get_features


def make_plain(core: nn.Module, name: str) -> Callable[..., Any]:
    """A method of the model's own that never merges: a later step of it needs the whole grid of patches."""

    @functools.wraps(getattr(type(core), name))
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        handle = self._pitome
        stats = handle.state.stats
        with handle.choosing(None):
            output = getattr(type(self), name)(self, *args, **kwargs)
        handle.note(stats=stats)
        return output

    return method
