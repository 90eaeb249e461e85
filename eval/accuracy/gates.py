"""What embedded model and benchmark must show, from the CSV of `curves`: ``python -m pitome_mllm_eval.accuracy.gates``.

Exits with 1 if a gate fails: then the benchmark or the model is mended, not the gate.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pitome_mllm import METHODS
from pitome_mllm.families.geometry import geometry
from pitome_mllm.loading import read_config
from pitome_mllm.methods import UserError

from ..benchmark.questions import CATEGORIES
from ..benchmark.sets import PER_SCENE, SCENES
from ..documents import markdown
from .curves import BLIND, COMMAND, KEEPS, PLACES, RESULTS, Setting, results, settings
from .runs import PLAIN
from .tables import points

NEAR = "low end of"  # how the names of the gates about keep 288 begin


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

    @property
    def shown(self) -> list[str]:
        """Measured, interval, bound and verdict, as tables show them."""
        sign = "at least" if self.at_least else "at most"
        span = "{:.1f} to {:.1f}".format(*self.interval) if self.interval else ""
        return [f"{self.value:.1f}", span, f"{sign} {self.bound:g}", "passes" if self.passed else "FAILS"]


def gates(found: list[dict[str, str]]) -> Iterator[Gate]:
    """Every gate, in per cent or points."""
    every = {(Setting.of(row), row["group"], row["against"]): points(row) for row in found}
    plain, blind = (
        {
            group: figures
            for (setting, group, against), figures in every.items()
            if setting.method == name and not against
        }
        for name in (PLAIN, BLIND)
    )
    worst = {
        key[1:]: figures for key, figures in every.items() if key[0] == Setting("random", "tower", 72, published=True)
    }
    for group, bound in (("all", 90), *((category, 85) for category in CATEGORIES)):
        yield _gate(f"plain, {group}", plain[group], bound)
    yield _gate("blind, all", blind["all"], 45, at_least=False)
    for other, bound in ((PLAIN, 10), ("tome", 5)):
        value, low, high = worst["all", other]
        yield _gate(f"{other} - random, tower, keep 72", [-value, -high, -low], bound)
    (pair,) = (key for key in worst if " - " in key[0])
    yield _gate(f"change of {pair[0]}, random, tower, keep 72", worst[pair], 10)
    for (setting, group, against), (_, low, _) in every.items():
        if setting.keep == 288 and group != "all" and not against:  # not at chance: the interval lies above blind
            yield Gate(f"{NEAR} {setting} - blind, {group}", low - blind[group][0], 0)
    yield Gate("slowest run, CPU seconds", max(float(row["seconds"]) for row in found if row["seconds"]), 300, False)


def _gate(name: str, figures: list[float], bound: float, at_least: bool = True) -> Gate:
    value, low, high = figures
    return Gate(name, value, bound, at_least, (low, high))


def every_setting(found: list[dict[str, str]]) -> set[Setting]:
    """What `curves` measures of the methods that its results name, as published or not."""
    named = {(row["method"], row["published"]) for row in found}
    every = settings(METHODS, PLACES, KEEPS, geometry(read_config("tiny")))
    return {setting for setting in every if (setting.method, str(setting.published)) in named}


def check_whole(found: list[dict[str, str]], wanted: set[Setting]) -> None:
    """Refuse results that the gates are not about.

    Raises
    ------
    ValueError : another split than test, a part of its questions or categories, several models, no clean commit, or not
        the runs that are ``wanted``.
    """
    whole = [row for row in found if row["group"] == "all" and not row["against"]]
    splits, counts = {row["split"] for row in whole}, {int(row["questions"]) for row in whole}
    measured = {Setting.of(row) for row in whole if row["method"] not in (PLAIN, BLIND)}
    if len(several := {row["weights"] for row in found}) > 1:
        raise UserError(f"the gates need runs of one model; got weights {', '.join(sorted(several))}")
    if unknown := [row["commit"] for row in found if not row["commit"] or row["commit"].endswith("-dirty")]:
        raise UserError(f"the gates need runs of clean commits; got {unknown[0] or 'none'!r}")
    for group in CATEGORIES:
        if len(part := [row for row in found if row["group"] == group and not row["against"]]) != len(whole):
            raise UserError(f"the gates need every category of every run; got {len(part)} of {len(whole)} for {group}")
    if splits != {"test"} or counts != {SCENES * PER_SCENE} or measured != wanted:
        missing, unknown = (", ".join(sorted(map(str, some))[:5]) for some in (wanted - measured, measured - wanted))
        raise UserError(
            f"the gates need all {len(wanted)} runs over the whole test set; got split {', '.join(sorted(splits))}, "
            f"questions {sorted(counts)}, {len(measured)} runs, missing {missing or 'none'}, unknown "
            f"{unknown or 'none'}; run {COMMAND}"
        )


def table(found: list[dict[str, str]]) -> str:
    """A Markdown table of the gates, of those about keep 288 the closest one."""
    checked = list(gates(found))
    near = [gate for gate in checked if gate.name.startswith(NEAR)]
    closest = min(near, key=lambda gate: gate.value)
    lines = [["gate", "measured", "95 % interval", "bound", ""]]
    for gate in checked:
        if gate not in near or gate is closest:
            name = f"{gate.name} (the closest of {len(near)})" if gate is closest else gate.name
            lines.append([name, *gate.shown])
    return markdown(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the gates and exit with 1 if one fails."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    try:
        found = results(args.results)
        check_whole(found, every_setting(found))
        checked = list(gates(found))
    except UserError as error:
        parser.error(str(error))
    view = Table("gate", "measured", "95 % interval", "bound", "")
    for gate in checked:
        view.add_row(gate.name, *gate.shown)
    Console().print(view)
    sys.exit(not all(gate.passed for gate in checked))


if __name__ == "__main__":
    main()
