"""Tokens to try methods on: drawn by hypothesis, of every kind, and what a method's own row says of it.

A new method is tried as soon as it has its row in METHODS. What it cannot promise, it says in one of the sets below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from pitome_mllm.methods import METHODS, Merge, Reducer

BLIND = {"random", "uniform", "pool", "downsample", "dct"}  # decide without looking at the metric
RESCALING = {"tofu", "visionzip", "prumerge", "prumerge-plus"}  # combine otherwise than by the size-weighted mean
GROUPLESS = {"dct"}  # merge.group is None
SELECTING = {"random", "uniform", "divprune", "dart", "cdpruner"}  # drop tokens and merge none

NAMES = sorted(METHODS)
GROUPING = [name for name in NAMES if name not in GROUPLESS]
AVERAGING = [name for name in GROUPING if name not in RESCALING]
SEEING = [name for name in GROUPING if name not in BLIND]
STEPPING = [name for name in GROUPING if not METHODS[name].reducer.once]
FINITE = ("normal", "positive", "duplicates", "equal", "zero", "some zero", "one hot", "huge", "tiny")
FLAVOURS = (*FINITE, "nan", "all nan", "infinite")
TOKENS = (36, 25, 17, 16, 9, 7, 5, 4, 3, 2, 1)
ANY_SHARE = st.sampled_from((1.0, 0.75, 0.5, 0.3, 0.1, 0.0))

fast = settings(derandomize=True, deadline=None, max_examples=30, database=None)


def each(names: list[str]):
    return pytest.mark.parametrize("name", names)


def metric_of(flavour: str, batch: int, tokens: int, channels: int, random: torch.Generator) -> Tensor:
    """A metric (B, N, C) of one kind, normal or nasty."""
    normal = torch.randn(batch, tokens, channels, generator=random)
    exact = _exact(batch, tokens, channels, random)
    some = torch.rand(batch, tokens, 1, generator=random) < 0.3
    made = {
        "normal": lambda: normal,
        "positive": lambda: normal.abs() + 0.5,
        "duplicates": lambda: exact[:, torch.randint(max(1, tokens // 3), (tokens,), generator=random)],
        "equal": lambda: exact[:, :1].expand_as(normal).clone(),
        "zero": lambda: torch.zeros_like(normal),
        "some zero": lambda: normal.masked_fill(some, 0.0),
        "one hot": lambda: torch.eye(channels)[torch.randint(channels, (batch, tokens), generator=random)],
        "huge": lambda: normal * 1e30,
        "tiny": lambda: normal * 1e-40,
        "all nan": lambda: torch.full_like(normal, math.nan),
        "nan": lambda: normal.masked_fill(some, math.nan),
        "infinite": lambda: normal.masked_fill(some, -math.inf),
    }
    return made[flavour]()


def _exact(batch: int, tokens: int, channels: int, random: torch.Generator) -> Tensor:
    """Rows of one or four entries 1 or -1: quarters are their cosines in float32, so that ties are ties anywhere."""
    signs = torch.randint(2, (batch, tokens, channels), generator=random) * 2.0 - 1.0
    order = torch.rand(batch, tokens, channels, generator=random).argsort(-1)
    return signs.masked_fill(order >= (4 if channels >= 4 else 1), 0.0)


@dataclass
class Tokens:
    """One drawn input; ``share`` of what a method can remove is removed."""

    flavour: str
    batch: int
    patches: int
    protected: int
    channels: int
    share: float
    depth: float
    seed: int

    def make(self, reducer: Reducer) -> SimpleNamespace:
        """metric, x, size, r and the keywords of `match` for one reducer."""
        random = torch.Generator().manual_seed(self.seed)
        patches = math.isqrt(self.patches) ** 2 if "grid" in reducer.needs else self.patches
        n = patches + self.protected
        metric = metric_of(self.flavour, self.batch, n, self.channels, random)
        x = torch.randn(self.batch, n, 5, generator=random)
        size = torch.randint(1, 6, (self.batch, n, 1), generator=random).float()
        possible = removable(reducer, patches)
        r = possible[round(self.share * (len(possible) - 1))]
        options = {"size": size, "protected": self.protected, "depth": self.depth} | extras(
            reducer, self.batch, n, patches
        )
        return SimpleNamespace(metric=metric, x=x, size=size, r=r, n=n, patches=patches, options=options)


def extras(reducer: Reducer, batch: int, tokens: int, patches: int) -> dict[str, Any]:
    """What `match` requires beyond the metric, where the reducer says so."""
    random = torch.Generator().manual_seed(tokens)
    side = math.isqrt(patches)
    values = {
        "attention": torch.rand(batch, tokens, generator=random),
        "grid": (side, side),
    }
    return {key: values[key] for key in reducer.needs}


def removable(reducer: Reducer, patches: int) -> list[int]:
    """All r that one step can remove of ``patches`` unprotected tokens, ascending."""
    most = reducer.max_removable(patches)
    return sorted(patches - keep for keep in reducer.allowed(patches) if patches - keep <= most)


def tokens(flavours=FLAVOURS, batch=(1, 3), share=ANY_SHARE, patches=TOKENS):
    return st.builds(
        Tokens,
        flavour=st.sampled_from(flavours),
        batch=st.integers(*batch),
        patches=st.sampled_from(patches),
        protected=st.integers(0, 2),
        channels=st.integers(1, 6),
        share=share,
        depth=st.sampled_from((0.0, 0.3, 13 / 23, 22 / 23, 1.0)),
        seed=st.integers(0, 2**20),
    )


def of_row(value: Any, row: int) -> Any:
    return value[row : row + 1] if isinstance(value, Tensor) else value


def members(merge: Merge, row: int) -> list[list[int]]:
    """The token indices of every group of one row."""
    group = merge.group[row].tolist()
    return [[i for i, g in enumerate(group) if g == number] for number in range(merge.count)]


def mean_of_groups(merge: Merge, x: Tensor, size: Tensor) -> Tensor:
    """Size-weighted mean (B, K, C) of every group, in float64, from the groups alone."""
    weight = torch.nn.functional.one_hot(merge.group + 1, merge.count + 1)[..., 1:].double() * size.double()
    return weight.mT @ x.double() / weight.sum(1)[..., None]


def chain(reducer: Reducer, t: SimpleNamespace, drawn: Tokens, steps: int) -> list[Merge]:
    """``steps`` merges, each of what the one before leaves, by the drawn share of what is possible."""
    metric, size, patches, merges = t.metric, t.size, t.patches, []
    for _ in range(steps):
        possible = removable(reducer, patches)
        r = possible[round(drawn.share * (len(possible) - 1))]
        options = t.options | {"size": size} | extras(reducer, drawn.batch, metric.shape[1], patches)
        merges.append(reducer.match(metric, r, **options))
        metric, _ = merges[-1].reduce(metric, size)
        size = merges[-1].reduce(t.x[:, : size.shape[1]], size)[1]
        patches -= r
    return merges
