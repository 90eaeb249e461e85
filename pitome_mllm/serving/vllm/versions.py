"""Which vLLM the plug-in knows, and whether the one at hand is like that."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import packages_distributions, version
from typing import Any

from ...errors import UserError

KNOWN = ((0, 32), (0, 33))  # the first and the last release
RANGE = "vLLM 0.32 to 0.33"
INSTALL = "pip install 'vllm>=0.32,<0.34'"


def check() -> None:
    """UserError unless an installed vLLM is one that the plug-in knows; vLLM is not imported."""
    found = packages_distributions().get("vllm")
    if not found:
        raise UserError(f"vLLM is not installed; the plug-in works with {RANGE}: {INSTALL}")
    installed = version(found[0])
    if not KNOWN[0] <= tuple(int(part) for part in installed.split(".")[:2] if part.isdigit()) <= KNOWN[1]:
        raise UserError(
            f"vLLM {installed} is installed, and this release of pitome-mllm works with {RANGE}: {INSTALL}, look "
            "for a newer pitome-mllm, or serve with --engine transformers"
        )


def check_overrides(*pairs: tuple[type, type], new: Collection[str] = ()) -> None:
    """UserError where a method of a pair's first class takes something else than the second's, which it overrides.

    All of them override one, but for those named in ``new``: one that vLLM has no more would never be called.
    """
    for ours, theirs in pairs:
        for name, own in vars(ours).items():
            if not inspect.isfunction(own) or name in new:
                continue
            if not hasattr(theirs, name):
                raise UserError(
                    f"{theirs.__module__}.{theirs.__qualname__} has no {name} in this vLLM, which the plug-in "
                    f"overrides; it works with {RANGE}: {INSTALL}"
                )
            _compare(getattr(theirs, name), list(inspect.signature(own).parameters))


def check_calls(called: Mapping[Callable[..., Any], str]) -> None:
    """UserError where a function of vLLM's has other parameters than those named, which the plug-in calls it with."""
    for function, names in called.items():
        _compare(function, names.split())


def _compare(theirs: Callable[..., Any], wanted: list[str]) -> None:
    found = list(inspect.signature(theirs).parameters)
    if found != wanted:
        raise UserError(
            f"{theirs.__module__}.{theirs.__qualname__} takes {', '.join(found)} in this vLLM, and the plug-in expects "
            f"{', '.join(wanted)}; it works with {RANGE}: {INSTALL}"
        )
