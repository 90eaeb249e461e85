"""What the embedded model and its benchmark must show, from the CSV of `curves`: ``python -m pitome_mllm_eval.gates``.

Exits with 1 if a gate fails: then the benchmark or the model is mended, not the gate.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .benchmark import PER_SCENE, SCENES
from .curves import BLIND, RESULTS
from .documents import read
from .questions import CATEGORIES
from .runs import PLAIN


@dataclass(frozen=True)
class Gate:
    """One requirement and what was measured, where it is one figure of the CSV with its 95 % interval."""

    name: str
    value: float
    bound: float
    at_least: bool = True
    interval: tuple[float, float] | None = None

    @property
    def passed(self) -> bool:
        """Whether the measured value is on the right side of the bound."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def gates(found: list[dict[str, str]]) -> Iterator[Gate]:
    """Every gate, in per cent or points."""
    figure = {
        (row["method"], row["where"], int(row["keep"]), row["group"], row["against"]): [
            100 * float(row[name]) for name in ("value", "low", "high")
        ]
        for row in found
        if not row["like"]
    }
    plain, blind = (
        {group: figures for (method, _, _, group, against), figures in figure.items() if method == name and not against}
        for name in (PLAIN, BLIND)
    )
    for group, bound in (("all", 90), *((category, 85) for category in CATEGORIES)):
        yield _gate(f"plain, {group}", plain[group], bound)
    yield _gate("blind, all", blind["all"], 45, at_least=False)
    for other, bound in ((PLAIN, 10), ("tome", 5)):
        value, low, high = figure["random", "tower", 72, "all", other]
        yield _gate(f"{other} - random, tower, keep 72", [-value, -high, -low], bound)
    (pair,) = (key for key in figure if key[:3] == ("random", "tower", 72) and " - " in key[3])
    yield _gate(f"change of {pair[3]}, random, tower, keep 72", figure[pair], 10)
    for (method, where, keep, group, against), (_, low, _) in figure.items():
        if keep == 288 and group != "all" and not against:  # nothing at chance: the whole interval lies above blind
            yield Gate(f"low end of {method} - blind, {where}, keep 288, {group}", low - blind[group][0], 0)
    yield Gate("slowest run, CPU seconds", max(float(row["seconds"]) for row in found if row["seconds"]), 300, False)


def _gate(name: str, figures: list[float], bound: float, at_least: bool = True) -> Gate:
    value, low, high = figures
    return Gate(name, value, bound, at_least, (low, high))


def check_whole(found: list[dict[str, str]]) -> None:
    """Refuse results that the gates are not about.

    Raises
    ------
    ValueError : another split than test, a part of its questions, or no run at keep 288, of random or of tome.
    """
    whole = [row for row in found if row["group"] == "all" and not row["against"]]
    splits, counts = {row["split"] for row in whole}, {int(row["questions"]) for row in whole}
    keeps = {int(row["keep"]) for row in whole}
    compared = {row["method"] for row in whole if (row["where"], row["keep"]) == ("tower", "72")}
    if splits != {"test"} or counts != {SCENES * PER_SCENE} or 288 not in keeps or not {"random", "tome"} <= compared:
        raise ValueError(
            "the gates need the whole test set at keep 288, and random and tome in the tower at keep 72; got split "
            f"{', '.join(sorted(splits))}, questions {sorted(counts)}, keep {sorted(keeps)}, in the tower at keep 72 "
            f"{', '.join(sorted(compared)) or 'nothing'}; run python -m pitome_mllm_eval.curves"
        )


def main(argv: list[str] | None = None) -> None:
    """Print the gates and exit with 1 if one fails."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    try:
        found = read(args.results)
        check_whole(found)
        checked = list(gates(found))
    except ValueError as error:
        parser.error(str(error))
    view = Table("gate", "measured", "95 % interval", "bound", "")
    for gate in checked:
        sign = "at least" if gate.at_least else "at most"
        span = "{:.1f} - {:.1f}".format(*gate.interval) if gate.interval else ""
        view.add_row(
            gate.name, f"{gate.value:.1f}", span, f"{sign} {gate.bound:g}", "passes" if gate.passed else "FAILS"
        )
    Console().print(view)
    sys.exit(not all(gate.passed for gate in checked))


if __name__ == "__main__":
    main()
