"""What the embedded model and its benchmark must show, from the CSV of `curves`: ``python -m pitome_mllm_eval.gates``.

Exits with 1 if a gate fails: then the benchmark or the model is mended, not the gate.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .curves import BLIND, PLAIN, RESULTS
from .questions import CATEGORIES
from .report import read


@dataclass(frozen=True)
class Gate:
    """One requirement and what was measured."""

    name: str
    value: float
    bound: float
    at_least: bool = True

    @property
    def passed(self) -> bool:
        """Whether the measured value is on the right side of the bound."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def gates(found: list[dict[str, str]]) -> Iterator[Gate]:
    """Every gate, in per cent or points."""
    figure = {
        (row["method"], row["where"], int(row["keep"]), row["group"]): 100 * float(row["value"])
        for row in found
        if not row["against"]
    }
    plain = {group: value for (method, _, _, group), value in figure.items() if method == PLAIN}
    blind = {group: value for (method, _, _, group), value in figure.items() if method == BLIND}
    yield Gate("plain, all", plain["all"], 90)
    for category in CATEGORIES:
        yield Gate(f"plain, {category}", plain[category], 85)
    yield Gate("blind, all", blind["all"], 45, at_least=False)
    random, tome = figure["random", "tower", 72, "all"], figure["tome", "tower", 72, "all"]
    yield Gate("plain - random, tower, keep 72", plain["all"] - random, 10)
    yield Gate("tome - random, tower, keep 72", tome - random, 5)
    losses = {c: plain[c] - figure["random", "tower", 72, c] for c in CATEGORIES}
    most, least = max(losses, key=losses.get), min(losses, key=losses.get)
    yield Gate(f"loss of {most} - loss of {least}, random, tower, keep 72", losses[most] - losses[least], 10)
    for row in found:  # nothing may be at chance: the whole interval lies above what not looking gives
        if int(row["keep"]) == 288 and row["group"] in CATEGORIES and not row["against"]:
            name = f"{row['method']} - blind, {row['where']}, keep 288, {row['group']}"
            yield Gate(name, 100 * float(row["low"]) - blind[row["group"]], 0)


def main(argv: list[str] | None = None) -> None:
    """Print the gates and exit with 1 if one fails."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    try:
        checked = list(gates(read(args.results)))
    except ValueError as error:
        parser.error(str(error))
    view = Table("gate", "measured", "bound", "")
    for gate in checked:
        sign = "at least" if gate.at_least else "at most"
        view.add_row(gate.name, f"{gate.value:.1f}", f"{sign} {gate.bound:g}", "passes" if gate.passed else "FAILS")
    Console().print(view)
    sys.exit(not all(gate.passed for gate in checked))


if __name__ == "__main__":
    main()
