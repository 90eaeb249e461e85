"""What a visitor can set, as keywords of ``handle.using`` and as words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pitome_mllm import METHODS
from pitome_mllm.families.geometry import Geometry
from pitome_mllm.methods import UserError
from pitome_mllm.plan import Plan
from pitome_mllm.schedule import EVERY
from pitome_mllm.serving.resolution import amount
from pitome_mllm.settings import DEFAULT_METHOD

AMOUNTS = {"tokens": "tokens left", "ratio": "ratio per block"}
OWN = "default"
PLACES = {
    OWN: OWN,
    "tower": "inside the vision tower",
    "projector": "after the vision tower",
    "both": "inside and after the vision tower",
    "packed": "after the projector",
}
MERGES = (OWN, EVERY, *map(str, (3, 4, 5, 6, 8, 12)))
NOTHING, PLAIN = "nothing", "plain"  # what to compare with, beside the methods and smaller pictures
PER_CENT = 100
KINDS = ("PiToMe", "merging", "selecting", "control")


@dataclass(frozen=True)
class Controls:
    """Settings of one turn."""

    method: str = DEFAULT_METHOD
    amount: str = "tokens"  # that ``keep`` says; or "ratio", which ``ratio`` says
    keep: int | float | None = None  # visual tokens left per picture, or a share of them; None = a quarter
    ratio: float = 0.9  # share of its tokens that every block of the tower keeps
    where: str = OWN  # one of `PLACES`
    merges: int | str = OWN  # how many blocks of the tower merge, or one of `MERGES`; where ``keep`` counts
    published: bool = False  # what the method's paper does

    def settings(self) -> dict[str, Any]:
        """The keywords of ``handle.using`` and of `estimate`."""
        if self.amount not in AMOUNTS:
            raise UserError(f"unknown amount {self.amount!r}; choose one of {', '.join(AMOUNTS)}")
        keep = 0.25 if self.keep is None else self.keep
        merges = None if self.merges == OWN else self.merges
        merges = int(merges) if isinstance(merges, str) and merges.isdigit() else merges
        much = {"keep": keep, "merges": merges} if self.amount == "tokens" else {"ratio": self.ratio}
        where = None if self.where == OWN else self.where
        return {"method": self.method, "published": self.published, "where": where, **much}

    @classmethod
    def of(cls, values: Mapping[str, Any], available: int | None) -> Controls:
        """From what a page or a client sends, numbers perhaps as floats, about a picture of ``available`` tokens.

        Where that depends on the picture (None), ``keep`` is in per cent.
        """
        keep, ratio, by_tokens = values["keep"], values["ratio"], values["amount"] != "ratio"
        number, most, what = keep if by_tokens else ratio, available or PER_CENT, "tokens" if available else "per cent"
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise UserError(f"there is no number; give {f'1 to {most} {what}' if by_tokens else 'a ratio up to 1'}")
        if by_tokens and (keep != int(keep) or not 1 <= keep <= most):
            raise UserError(f"{keep:g} {what} are not possible; give a whole number from 1 to {most}")
        amount = int(keep) if available else keep / PER_CENT
        return cls(**{**values, "keep": amount if by_tokens else None})


def menu() -> list[tuple[str, str]]:
    """Every method with a line about it, in groups."""

    def kind(name: str) -> str:
        method = METHODS[name]
        if name.startswith("pitome"):
            return "PiToMe"
        if method.reference == "control":
            return "control"
        return "selecting" if method.settings.get("where") == "projector" else "merging"

    names = sorted(METHODS, key=lambda name: KINDS.index(kind(name)))
    return [(f"{name} ({kind(name)}): {METHODS[name].summary.removesuffix(' (control)')}", name) for name in names]


def label(plan: Plan | None, geometry: Geometry, pictures: int = 1) -> str:
    """One line that says what a turn was asked with; None = the plain model."""
    many = f"{pictures} pictures {'of' if geometry.family.tiles else '×'} " if pictures > 1 else ""
    if plan is None:
        tokens = f"{geometry.available} tokens{' per tile' if geometry.family.tiles else ''}"
        return f"plain · {many}all {'tokens' if geometry.family.side else tokens}"
    left = amount(plan).replace(" visual", "")
    return f"{plan.method}{', published' if plan.published else ''} · {many}{left} · {PLACES[plan.where]}"


def describe(plan: Plan) -> str:
    """What is left of a picture's tokens, or a tile's, and where they merge, in words."""
    scaled = plan.input_patches != plan.geometry.patches
    where = f"from a picture scaled to {plan.input_patches} patches" if scaled else PLACES[plan.where]
    return f"{amount(plan)}, {where}"
