"""What `pitome-mllm cost` says about a model: its table over ratio and keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..costs.flops import Estimate, estimate
from ..costs.memory import largest_batch, weight_bytes
from ..costs.published import Shape
from ..families.geometry import geometry


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


@dataclass(frozen=True)
class Costs:
    """A model's costs for one image."""

    shape: Shape
    method: str
    published: bool = False
    text_tokens: int = 40
    new_tokens: int = 1
    memory: float = 24e9
    bits: int | None = None

    @cached_property
    def config(self) -> Any:
        return self.shape.config()

    @cached_property
    def plain(self) -> Estimate:
        return estimate(self.config, **self._counts)

    @property
    def _counts(self) -> dict[str, int]:
        return {"images": self.shape.images, "text_tokens": self.text_tokens, "new_tokens": self.new_tokens}

    def row(self, **given: Any) -> Row:
        """With ``ratio=``, ``keep=``, or nothing: the plain model."""
        alone, keep = self.shape.text is None, "plain"
        settings = {"method": self.method, "published": self.published, **given, **self._counts}
        if not given:
            settings = self._counts
        cost = estimate(self.config, **settings) if given else self.plain
        if "keep" in given:
            keep = f"keep {cost.visual_tokens}"
        return Row(
            setting=f"ratio {given['ratio']:g}" if "ratio" in given else keep,
            tokens=self.shape.images * cost.visual_tokens,
            tower_gflops=None if alone else (cost.tower_flops + cost.merging_flops) / 1e9,
            llm_gflops=None if alone else (cost.projector_flops + cost.prefill_flops + cost.decode_flops) / 1e9,
            gflops=cost.flops / 1e9,
            saved=1 - cost.flops / self.plain.flops,
            kv_mb=None if alone else cost.kv_bytes / 1e6,
            batch=None if alone else largest_batch(self.config, self.memory, bits=self.bits, **settings),
        )

    def section(self, ratios: Sequence[float], keeps: Sequence[int | float]) -> Section:
        """The table and notes."""
        settings = [{}, *({"ratio": ratio} for ratio in ratios), *({"keep": keep} for keep in keeps)]
        notes = [self.shape.about] if self.shape.about else []
        if self.shape.text is not None:
            kinds = {"float16": None, "8 bits": 8, "4 bits": 4}
            sizes = [f"{weight_bytes(self.config, bits=bits) / 1e9:.2f} GB in {name}" for name, bits in kinds.items()]
            notes.append(f"Weights: {', '.join(sizes)}.")
        if (ratio := self.shape.paper_ratio) is not None:
            saved = replace(self, published=True).row(ratio=ratio).saved
            notes.append(f"The paper's results for this model are at ratio {ratio:g}, which saves {saved:.1%}.")
        if (cost := self.shape.paper_cost) is not None:
            counts = cost.counts(geometry(self.config).patches, geometry(self.config).blocks)
            ours = replace(self, published=True).row(counts=counts)
            notes.append(
                f"The paper's table says {cost.plain:g} and {cost.merged:g} GFLOPs, with a multiply-add as one. With "
                f"{cost.removed} patches less after every block it is {self.plain.flops / 2e9:.1f} and "
                f"{ours.gflops / 2:.1f} here, which saves {ours.saved:.1%}; no one ratio gives the figures of all "
                "its models."
            )
        return Section(self.shape.title, [self.row(**given) for given in settings], notes)
