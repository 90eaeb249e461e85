"""``pitome-mllm spectrum``: how far merging changes the graph of an image's tokens, by method and keep."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from ..errors import UserError
from ._inputs import read_subject
from ._options import add_model, add_published, add_subject, check_method, keep, open_model, progress
from ._report import print_table

KEEPS = (0.5, 0.25, 0.125, 0.0625)
WHAT = (
    "Between the features of the plain model and their groups: sum of |change| over the spectrum of the normalised "
    "Laplacian; 0 = nothing changed. A dropped token keeps its place without edges."
)
BEHIND = "where='packed' merges behind the projector; spectra are those of the tower's tokens"


@dataclass
class Comparison:
    """Spectral distances by method, in the order of ``keeps``; None where there is none, for the reason in ``why``."""

    keeps: list[int]
    distances: dict[str, list[float | None]] = field(default_factory=dict)
    why: list[str] = field(default_factory=list)


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "spectrum",
        help="compare how far methods change the graph of tokens",
        description="The spectral distance between a picture's tokens before and after merging, by method and keep.",
    )
    add_subject(parser, question=False)
    add_model(parser)
    group = parser.add_argument_group("merging")
    group.add_argument("--method", nargs="+", metavar="M", help="of `pitome-mllm methods` (default: all)")
    add_published(group)
    group.add_argument(
        "--keep", nargs="+", type=keep, default=KEEPS, metavar="K", help="visual tokens left, numbers or shares"
    )
    group.add_argument("--where", metavar="W", help="tower, projector or both (default: each method's own)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Compare methods on one image."""
    from ..families.features import pixel_values
    from ..methods import METHODS

    methods = options.method or list(METHODS)
    for method in methods:
        check_method(method)
    subject = read_subject(options)
    model, processor = open_model(options)
    place = {"where": options.where, "published": options.published}
    found = compare(model, pixel_values(processor, subject.picture), methods, options.keep, place)
    about = f"{subject.name}, {options.model}, {options.where or 'every method at its own place'}"
    about += ", as published" * options.published
    if options.json:
        asked = {"model": options.model, "picture": subject.name, **place, "keep": found.keeps}
        sys.stdout.write(json.dumps({**asked, "spectral_distance": found.distances, "impossible": found.why}) + "\n")
        return
    show(found, about)


def compare(
    model: Any, pixels: Any, methods: Sequence[str], keeps: Sequence[int | float], place: Mapping[str, Any]
) -> Comparison:
    """Spectral distances of the plain model's features, over what the methods make of ``pixels`` (I, 3, H, W)."""
    from ..families.features import tower_features
    from ..families.geometry import geometry
    from ..schedule import target_count
    from ..spectral import TokenGraph

    shape = geometry(model)
    if not shape.family.merges_in_tower:
        raise UserError(BEHIND)
    counts = [target_count(keep, shape.available) for keep in keeps]
    found = Comparison(sorted(set(counts), reverse=True))
    with progress("Computing spectra", total=len(methods) * len(found.keeps)) as advance:
        graph = TokenGraph(tower_features(model, pixels).float().cpu())
        for method, keep in product(methods, found.keeps):
            try:
                value = _distance(model, pixels, graph, method, {**place, "keep": keep})
            except UserError as error:
                value, reason = None, f"{method}: {error}"
                found.why += [reason] * (reason not in found.why)
            found.distances.setdefault(method, []).append(value)
            advance()
    if all(value is None for values in found.distances.values() for value in values):
        raise UserError(found.why[0])
    return found


def _distance(model: Any, pixels: Any, graph: Any, method: str, settings: Mapping[str, Any]) -> float:
    """One figure; a UserError says why there is none."""
    from ..attach import attach
    from ..families.features import tower_features

    with attach(model, method, **settings) as handle:
        if handle.plan.where == "packed":
            raise UserError(BEHIND)
        tower_features(model, pixels)
        if any(merge.group is None for merge in handle.stats.merges):
            raise UserError("this method forms no groups, so there is no graph of groups; choose one that merges")
        return float(graph.distance(handle.stats.merges).mean())


def show(found: Comparison, title: str) -> None:
    """A table: methods down, keeps across."""
    heads = ["method", *(f"keep {count}" for count in found.keeps)]
    lines = ([name, *("-" if v is None else f"{v:.4g}" for v in values)] for name, values in found.distances.items())
    print_table(heads, lines, f"Spectral distance: {title}", [WHAT, *found.why])
