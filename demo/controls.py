"""What a visitor can set, as keywords of ``handle.using`` and as words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pitome_mllm.families.geometry import Geometry
from pitome_mllm.methods import UserError
from pitome_mllm.plan import Plan
from pitome_mllm.schedule import EVERY
from pitome_mllm.settings import DEFAULT_METHOD

AMOUNTS = ("tokens", "ratio")
OWN_PLACE = "default"
PLACES = (OWN_PLACE, "tower", "projector", "both", "packed")
OWN_MERGES = "default"
MERGES = (OWN_MERGES, EVERY, *map(str, (3, 4, 5, 6, 8, 12)))


@dataclass(frozen=True)
class Controls:
    """Settings of one turn.

    Attributes
    ----------
    amount : "tokens" = ``keep`` counts, "ratio" = ``ratio`` counts.
    keep : visual tokens left per picture; None = a quarter.
    ratio : share of its tokens that every block of the tower keeps.
    where : one of `PLACES`.
    merges : how many blocks of the tower merge, or one of `MERGES`; where ``keep`` counts.
    published : what the method's paper does.
    """

    method: str = DEFAULT_METHOD
    amount: str = "tokens"
    keep: int | None = None
    ratio: float = 0.9
    where: str = OWN_PLACE
    merges: int | str = OWN_MERGES
    published: bool = False

    def settings(self) -> dict[str, Any]:
        """The keywords of ``handle.using`` and of `estimate`.

        Raises
        ------
        ValueError : an amount that is none of `AMOUNTS`.
        """
        if self.amount not in AMOUNTS:
            raise UserError(f"unknown amount {self.amount!r}; choose one of {', '.join(AMOUNTS)}")
        keep = 0.25 if self.keep is None else self.keep
        merges = None if self.merges == OWN_MERGES else self.merges
        merges = int(merges) if isinstance(merges, str) and merges.isdigit() else merges
        much = {"keep": keep, "merges": merges} if self.amount == "tokens" else {"ratio": self.ratio}
        place = None if self.where == OWN_PLACE else self.where
        return {"method": self.method, "published": self.published, "where": place, **much}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Controls:
        """From what a page or a client sends; numbers may come as floats.

        Raises
        ------
        ValueError : a keep that is no whole number.
        """
        values = dict(values)
        keep = values.get("keep")
        if keep is not None:
            if isinstance(keep, bool) or not isinstance(keep, (int, float)) or keep != int(keep):
                raise UserError(f"keep={keep!r} is not possible; give a whole number of tokens")
            values["keep"] = int(keep)
        return cls(**values)


def label(plan: Plan | None, geometry: Geometry) -> str:
    """One line that says what a turn was asked with; None = the plain model."""
    tokens = "tokens per tile" if geometry.family.tiles else "tokens"
    if plan is None:
        return f"plain · all {geometry.available} {tokens}"
    share = f"{plan.keep} of {plan.available} {tokens} ({plan.keep / plan.available:.0%})"
    return f"{plan.method}{', published' if plan.published else ''} · {share} · {plan.where}"


def describe(plan: Plan) -> str:
    """The way of a picture's tokens, or a tile's, through the model, in words."""
    steps = [plan.input_patches, *(left for _, left, _ in plan.steps)]
    way = " → ".join(map(str, steps)) if len(steps) > 1 else "nothing merges"
    start = (
        ""
        if plan.input_patches == plan.geometry.patches
        else f"the picture is scaled to {plan.input_patches} patches; "
    )
    share = f"{plan.keep} of {plan.available} visual tokens ({plan.keep / plan.available:.0%})"
    share += " per tile" if plan.geometry.family.tiles else ""
    return f"{share}, {plan.where}: {start}{way}"
