"""Accuracy over the number of visual tokens: ``python -m pitome_mllm_eval.accuracy.curves --jobs 16``.

Every method, as published and under the library's defaults, answers the benchmark at every keep. ``--out`` gets a row
for each run as it comes, with one bit for each question, so a run that was stopped goes on where it was; `SUMMARY`
beside it, the figures made of these rows. `report` makes plot and tables of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pitome_mllm import METHODS
from pitome_mllm.commands._options import progress
from pitome_mllm.families.geometry import geometry
from pitome_mllm.methods import UserError
from pitome_mllm.plan import make_plan
from pitome_mllm.settings import Settings

from ..benchmark.glyphs import SPLITS
from ..benchmark.questions import Question
from ..benchmark.scenes import GRID
from ..benchmark.sets import blind_answer, questions
from ..documents import append, read, write_csv
from ..provenance import RESULTS as FOLDER
from ..provenance import check_out
from .figures import BLIND, figures
from .runs import PLAIN, Answers, QuestionSet, code, load, measure, provenance

KEEPS = (288, 192, 144, 128, 72, 64, 36, 16)
SUMMARY = "accuracy.csv"  # of the two files the one that is installed
RESULTS = FOLDER / "curves.csv"
COMMAND = "python -m pitome_mllm_eval.accuracy.curves"
SAME = ("weights", "split", "torch", "transformers")  # what rows that go on with each other have in common


@dataclass(frozen=True)
class Setting:
    """One run: a method as published or under the library's defaults, keeping so many tokens."""

    method: str
    published: bool
    keep: int

    @classmethod
    def of(cls, row: dict[str, str]) -> Setting:
        """That of a row of a CSV."""
        return cls(row["method"], row["published"] == "True", int(row["keep"]))


ALL = Setting(PLAIN, False, GRID * GRID)  # the plain model


def packed(right: np.ndarray) -> str:
    """Bits (n,) as hexadecimal digits."""
    return np.packbits(right).tobytes().hex()


def unpacked(row: dict[str, str]) -> np.ndarray:
    """Which questions (n,) the run of a row answered right."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(row["right"]), np.uint8))
    return bits[: int(row["questions"])].astype(bool)


def results(path: Path = RESULTS) -> list[dict[str, str]]:
    """The rows of a CSV of this command; ValueError as `read`."""
    return read(path, COMMAND, ("published", "right", "code"))


def summary(path: Path = FOLDER / SUMMARY) -> list[dict[str, str]]:
    """The figures of a CSV of this command; ValueError as `read`."""
    return read(path, COMMAND, ("published", "change", "group_a"))


def called(method: str, published: bool) -> str:
    """What tables call a method."""
    return f"{method}, published" if published else method


def settings(methods: Iterable[str], keeps: Iterable[int], model: Any) -> dict[Setting, str]:
    """Every run that is possible, and where it merges."""
    found = {}
    for setting in (Setting(m, p, k) for m in methods for p in (True, False) for k in sorted(keeps, reverse=True)):
        if METHODS[setting.method].variant and not setting.published:
            continue  # always runs as published
        try:
            found[setting] = make_plan(Settings().changed(**asdict(setting)), geometry(model.config)).where
        except UserError:
            continue
    return found


def measured(args: argparse.Namespace, wanted: dict[Setting, str], seconds: float | None) -> Iterator[dict]:
    """The rows of everything that is ``wanted``, by where it merges, as they come."""
    longest = sorted(wanted, key=lambda setting: -setting.keep)
    given = [None if setting == ALL else asdict(setting) for setting in longest]
    for number, found in measure(QuestionSet(args.model, args.split, args.questions), given, args.jobs, seconds):
        yield _row(longest[number], wanted[longest[number]], found)


def blind(args: argparse.Namespace) -> dict[str, Any]:
    """The row of who does not look."""
    asked = questions(args.split)[: args.questions]
    right = np.array([blind_answer(question) == question.answer for _, question in asked])
    return _row(Setting(BLIND, False, 0), "none", Answers(right, 0))


def _row(setting: Setting, where: str, found: Answers) -> dict[str, Any]:
    """``right`` holds a bit for each question, in the benchmark's order, as hexadecimal digits."""
    about = {"method": setting.method, "published": setting.published, "where": where, "keep": setting.keep}
    return about | {"questions": len(found.right), "seconds": found.seconds, "right": packed(found.right)}


def usable(args: argparse.Namespace, about: dict[str, str]) -> list[dict[str, str]]:
    """The rows of ``--out`` that today's code made, or that are not asked for; ValueError if some are of others."""
    if not args.out.exists():
        return []
    found, count = results(args.out), len(questions(args.split)[: args.questions])
    if other := [row for row in found if any(row[n] != about[n] for n in SAME) or row["questions"] != str(count)]:
        got = ", ".join(other[0][name] for name in (*SAME, "questions"))
        raise UserError(f"{str(args.out)!r} holds rows of {got}; choose another --out, or move that file away")
    asked = {PLAIN, BLIND, *args.methods}
    return [row for row in found if row["code"] == about["code"] or row["method"] not in asked]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--model", default="tiny", help='"tiny" or the folder of a model trained like it')
    made.add_argument("--split", default="test", choices=SPLITS[1:])
    made.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    made.add_argument("--keeps", nargs="+", type=int, default=list(KEEPS))
    made.add_argument("--questions", type=int, help="only the first so many")
    made.add_argument("--jobs", type=int, default=1, help="processes, of one thread each (%(default)s)")
    made.add_argument("--seconds", type=float, help="after which no more is run; what is done is written")
    made.add_argument("--out", type=Path, default=RESULTS, help="%(default)s")
    return made


def main(argv: list[str] | None = None) -> None:
    """Measure, and write both CSVs."""
    args, began = parser().parse_args(argv), time.monotonic()
    torch.set_num_threads(1)
    about = provenance(args.model, args.split) | {"code": code()}
    try:
        check_out(args.out, RESULTS, (args.model, args.split, args.questions) == ("tiny", "test", None))
        rows = usable(args, about)
    except UserError as error:
        parser().error(str(error))
    known = {Setting.of(row) for row in rows}
    if rows:
        write_csv(args.out, rows)
    else:
        args.out.unlink(missing_ok=True)
    every = {ALL: "none", **settings(args.methods, args.keeps, load(args.model)[0])}
    wanted = {setting: where for setting, where in every.items() if setting not in known}
    with progress("Asking", len(wanted)) as advance:
        if BLIND not in {setting.method for setting in known}:
            append(args.out, [blind(args)], about)
        for made in measured(args, wanted, args.seconds and args.seconds - (time.monotonic() - began)):
            append(args.out, [made], about)
            advance()
    write_csv(args.out, in_order(results(args.out)))
    summarise(args.out)


def in_order(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Plain and blind, then methods as they are listed, as published first, with the most tokens first."""
    names = [PLAIN, BLIND, *METHODS]
    return sorted(rows, key=lambda r: (names.index(r["method"]), r["published"] != "True", -int(r["keep"])))


def answered(rows: list[dict[str, str]]) -> tuple[dict[tuple[str, bool, int], np.ndarray], list[tuple[int, Question]]]:
    """What every run answered right, and what was asked with the numbers of the scenes."""
    asked = questions(rows[0]["split"])[: int(rows[0]["questions"])]
    return {astuple(Setting.of(r)): unpacked(r) for r in rows}, asked


def summarise(path: Path = RESULTS) -> None:
    """Write what `figures` makes of a CSV of this command beside it."""
    rows = results(path)
    about = [{name: value for name, value in r.items() if name not in ("right", "code", "seconds")} for r in rows]
    made = zip(about, figures(*answered(rows)), strict=True)
    write_csv(path.with_name(SUMMARY), [said | found for said, found in made])


if __name__ == "__main__":
    main()
