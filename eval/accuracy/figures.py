"""Figures made of answers: accuracies, what they differ by from the plain model's, group A; and what they must show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pitome_mllm.settings import DEFAULT_METHOD

from ..benchmark.bootstrap import Bootstrap, groups
from ..benchmark.questions import CATEGORIES, Question
from ..documents import markdown
from .runs import PLAIN

BLIND = "blind"
COLUMNS = ("value", "low", "high", "change", "change_low", "change_high", "group_a", "group_a_low", "group_a_high")
COLUMNS += ("group_a_questions",)
Key = tuple[str, bool, int]  # method, whether as published, keep
Questions = Sequence[tuple[int, Question]]  # scene and question
# At most so many points the default may lose at a keep, and ToMe under the same defaults be behind it.
DEFAULT_LOSES = {144: 1.0, 72: 2.8, 36: 5.7, 16: 11.0}
TOME_BEHIND, TOME_KEEPS = 1.5, (288, 144, 72)


def bootstrap_of(asked: Questions) -> Bootstrap:
    """The bootstrap over the pictures of these questions."""
    return Bootstrap(np.array([scene for scene, _ in asked]))


def figures(right: Mapping[Key, np.ndarray], asked: Questions) -> Iterator[dict[str, float | str]]:
    """Accuracy, its difference to the plain model, and that in group A, of every run, from what (n,) it answered right.

    Group A (VTC-Bench, arXiv 2510.07143) are the questions that the plain model answers right, and `downsample` with as
    many tokens wrong. All with 95 % intervals.
    """
    bootstrap, everything = bootstrap_of(asked), np.ones(len(asked), bool)
    plain = next(found for (method, *_), found in right.items() if method == PLAIN)
    for (method, published, keep), found in right.items():
        made = [*bootstrap(found, everything), *bootstrap(found - plain.astype(float), everything)]
        small = right.get(("downsample", published, keep))
        hard = None if small is None or method in (PLAIN, BLIND) else plain & ~small
        if hard is not None and hard.any():
            made += [*bootstrap(found, hard), int(hard.sum())]
        yield dict.fromkeys(COLUMNS, "") | dict(zip(COLUMNS, (round(figure, 6) for figure in made)))


@dataclass(frozen=True)
class Gate:
    """One requirement in % or points: what was measured with its 95 % interval, and its bound."""

    name: str
    value: float
    low: float
    high: float
    bound: float
    at_least: bool = True

    @property
    def passed(self) -> bool:
        """Whether the measured value is on the right side of the bound."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def gates(right: Mapping[Key, np.ndarray], asked: Questions) -> Iterator[Gate]:
    """What embedded model, benchmark, default and ToMe must show, as far as it was measured."""
    bootstrap, masks = bootstrap_of(asked), groups([question for _, question in asked])
    plain, blind = (next(f for (m, *_), f in right.items() if m == name).astype(float) for name in (PLAIN, BLIND))

    def gate(name: str, values: np.ndarray, bound: float, at_least: bool = True, of: Any = "all", **less: Any) -> Gate:
        return Gate(name, *(100 * f for f in bootstrap(values, masks[of], **less)), bound, at_least)

    for group, bound in (("all", 90), *((category, 85) for category in CATEGORIES)):
        yield gate(f"plain, {group}", plain, bound, of=group)
    yield gate("blind, all", blind, 45, at_least=False)
    random, tome = right.get(("random", True, 72)), right.get(("tome", True, 72))
    if random is not None:
        yield gate("plain - random, keep 72", plain - random, 10)
        lost = sorted(CATEGORIES, key=lambda name: (plain - random)[masks[name]].mean())
        name = f"loss of {lost[-1]} - {lost[0]}, random, keep 72"
        yield gate(name, plain - random, 10, of=lost[-1], less=masks[lost[0]])
        if tome is not None:
            yield gate("tome - random, keep 72", tome.astype(float) - random, 5)
    yield from _of_defaults(right, plain, gate)


def _of_defaults(right: Mapping[Key, np.ndarray], plain: np.ndarray, gate: Callable[..., Gate]) -> Iterator[Gate]:
    """What is asked of the default method, and of ToMe beside it."""
    for keep in sorted({*DEFAULT_LOSES, *TOME_KEEPS}, reverse=True):
        ours, tome = (right.get((name, False, keep)) for name in (DEFAULT_METHOD, "tome"))
        if ours is not None and keep in DEFAULT_LOSES:
            yield gate(f"plain - {DEFAULT_METHOD}, keep {keep}", plain - ours, DEFAULT_LOSES[keep], at_least=False)
        if ours is not None and tome is not None and keep in TOME_KEEPS:
            name = f"{DEFAULT_METHOD} - tome, library defaults, keep {keep}"
            yield gate(name, ours.astype(float) - tome, TOME_BEHIND, at_least=False)


def gate_table(right: Mapping[Key, np.ndarray], asked: Questions) -> str:
    """A Markdown table of the gates."""
    lines = [["gate", "measured", "95 % interval", "bound", ""]]
    for gate in gates(right, asked):
        bound = f"{'at least' if gate.at_least else 'at most'} {gate.bound:g}"
        verdict = "passes" if gate.passed else "FAILS"
        lines.append([gate.name, f"{gate.value:.1f}", f"{gate.low:.1f} to {gate.high:.1f}", bound, verdict])
    return markdown(lines)
