"""What `pitome-mllm cost` says about a model: its table over ratio and keep, and how the paper's figures compare."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..costs.flops import Estimate, estimate
from ..costs.memory import largest_batch, weight_bytes
from ..costs.published import Shape

STEPS = 200  # ratios are looked for in steps of 1 / 200


@dataclass(frozen=True)
class Row:
    """One line of a table, for one image; None where a tower alone has no such figure."""

    setting: str
    tokens: int
    tower_gflops: float | None
    llm_gflops: float | None
    gflops: float
    saved: float
    kv_mb: float | None
    batch: int | None


@dataclass(frozen=True)
class Section:
    """What is said about one model."""

    title: str
    rows: list[Row]
    notes: list[str]


@dataclass
class Costs:
    """A model's costs for one image, each calculated once."""

    shape: Shape
    method: str
    published: bool = False
    text_tokens: int = 40
    new_tokens: int = 1
    memory: float = 24e9
    bits: int | None = None
    _known: dict[str, Estimate] = field(default_factory=dict)

    @cached_property
    def config(self) -> Any:
        return self.shape.config()

    @property
    def _counts(self) -> dict[str, int]:
        return {"images": self.shape.images, "text_tokens": self.text_tokens, "new_tokens": self.new_tokens}

    def __call__(self, **given: Any) -> Estimate:
        """The estimate for ``ratio=``, ``keep=``, or nothing: the plain model."""
        key = repr(given)
        if key not in self._known:
            self._known[key] = estimate(self.config, **self._counts, **self._merging(given))
        return self._known[key]

    def saved(self, **given: Any) -> float:
        """The share of the plain model's FLOPs that is saved."""
        return 1 - self(**given).flops / self().flops

    def batch(self, **given: Any) -> int:
        """The most images that fit in memory at once."""
        return largest_batch(self.config, self.memory, bits=self.bits, **self._counts, **self._merging(given))

    def _merging(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"method": self.method, "published": self.published, **given} if given else {}


def section(costs: Costs, ratios: Sequence[float], keeps: Sequence[int | float]) -> Section:
    """The table and notes of one model."""
    shape = costs.shape
    settings = [{}, *({"ratio": ratio} for ratio in ratios), *({"keep": keep} for keep in keeps)]
    notes = [shape.about] if shape.about else []
    if shape.text is not None:
        sizes = [
            (weight_bytes(costs.config, bits=bits) / 1e9, name) for bits, name in ((None, "float16"), (8, "8 bits"))
        ]
        sizes.append((weight_bytes(costs.config, bits=4) / 1e9, "4 bits"))
        notes.append(f"Weights: {', '.join(f'{size:.2f} GB in {name}' for size, name in sizes)}.")
    notes.append(_abstract(costs))
    if shape.paper_ratio is not None:
        saved = costs.saved(ratio=shape.paper_ratio)
        notes.append(f"The paper's results for this model are at ratio {shape.paper_ratio:g}, which saves {saved:.1%}.")
    return Section(shape.title, [_row(costs, given) for given in settings], notes)


def _row(costs: Costs, given: dict[str, Any]) -> Row:
    cost, alone = costs(**given), costs.shape.text is None
    keep = f"keep {cost.visual_tokens}" if "keep" in given else "plain"
    return Row(
        setting=f"ratio {given['ratio']:g}" if "ratio" in given else keep,
        tokens=costs.shape.images * cost.visual_tokens,
        tower_gflops=None if alone else (cost.tower_flops + cost.merging_flops) / 1e9,
        llm_gflops=None if alone else (cost.projector_flops + cost.prefill_flops + cost.decode_flops) / 1e9,
        gflops=cost.flops / 1e9,
        saved=costs.saved(**given),
        kv_mb=None if alone else cost.kv_bytes / 1e6,
        batch=None if alone else costs.batch(**given),
    )


def _abstract(costs: Costs) -> str:
    """Where the abstract's "40-60 % of the FLOPs saved" lies for this model."""
    ratios = [(STEPS - step) / STEPS for step in range(STEPS)]
    found = []
    for wanted in (0.4, 0.6):
        ratio = ratios[bisect_left(ratios, wanted, key=lambda ratio: costs.saved(ratio=ratio))]
        tokens = costs.shape.images * costs(ratio=ratio).visual_tokens
        found.append(f"{wanted:.0%} at ratio {ratio:g} ({costs.saved(ratio=ratio):.1%}, {tokens} tokens)")
    return (
        f"The paper's abstract speaks of 40-60 % of the FLOPs saved. This model saves {' and '.join(found)}: the "
        f"highest ratios in steps of {1 / STEPS:g} that do."
    )
