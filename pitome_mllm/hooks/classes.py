"""What attach puts on modules: hooks, and classes for encoder layers, and how those come off what others derived."""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from functools import lru_cache, reduce
from typing import Any

import torch
from torch import nn

from ..methods import UserError


class Hook(functools.partial):
    """A hook that torch.compile leaves alone, so that what a task or thread chose is asked anew in every call.

    It is a `partial` because torch.compile would look into a method. Copies of a model share it.
    """

    def __new__(cls, function: Callable[..., Any]) -> Hook:
        return super().__new__(cls, torch.compiler.disable(function))

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return refuse_pickling(type(self))


def refuse_pickling(cls: type) -> Any:
    """What pickle calls for whatever belongs to an attachment: ValueError."""
    raise UserError(
        f"a model with merging attached cannot be pickled ({cls.__name__}); call handle.remove() before torch.save or "
        "handing it to another process, or write it with model.save_pretrained(folder), which saves the plain model"
    )


class Merging(type):
    """The class of the classes that encoder layers get; pickle would not find those again."""

    _plain: type[nn.Module]  # the layer's own


copyreg.pickle(Merging, refuse_pickling)


@lru_cache
def plain_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A class without what `merging_class` added, in whatever was derived from it since then: FSDP derives one."""
    if "_plain" in vars(cls):
        return cls._plain
    bases = tuple(map(plain_class, cls.__bases__))
    if bases == cls.__bases__:
        return cls
    names = {old.__name__: new.__name__ for old, new in zip(cls.__bases__, bases)}
    name = reduce(lambda name, old: name.replace(old, names[old]), names, cls.__name__)
    left_out = ["__dict__", "__weakref__"] + ["forward"] * (author_of_forward(cls) is not cls)
    return type(name, bases, {k: v for k, v in vars(cls).items() if k not in left_out})


def author_of_forward(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that the forward of ``cls`` was written in.

    Newer transformers give every subclass of a layer a forward that wraps the one it inherits; that one does not count.
    """

    def written(forward: Callable[..., Any]) -> Callable[..., Any]:
        while hasattr(forward, "__wrapped__") and forward.__globals__["__name__"].startswith("transformers."):
            forward = forward.__wrapped__
        return forward

    forward = written(cls.forward)
    return [base for base in cls.__mro__ if written(vars(base).get("forward")) is forward][-1]
