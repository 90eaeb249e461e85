"""The search for the best PiToMe, what merging costs, and measuring several settings at a time."""

from __future__ import annotations

import csv
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest

from pitome_mllm import METHODS
from pitome_mllm.costs import latency
from pitome_mllm.families.geometry import Geometry
from pitome_mllm.hooks.run import Run
from pitome_mllm.plan import make_plan
from pitome_mllm.settings import DEFAULT_METHOD, DEFAULTS, Settings
from pitome_mllm_eval import documents
from pitome_mllm_eval.accuracy import costs, runs, search, tables
from pitome_mllm_eval.accuracy.curves import Setting, settings
from pitome_mllm_eval.accuracy.gates import every_setting

GEOMETRY = Geometry(grid=(24, 24), class_tokens=1, visible_class_tokens=0, merging_blocks=6, blocks=7)
QUESTIONS = 64


@pytest.fixture
def searched(tmp_path, monkeypatch):
    """Run the search where an answer is right with a chance that the settings decide; ``better`` says by how much."""

    def run(better: dict[str, float]) -> list[dict[str, str]]:
        def measure(jobs, model, split, limit, work, processes):
            assert split == "validation"
            gains = {
                name: sum(better.get(search.label({key: value}), 0.0) for key, value in job.items())
                for name, job in jobs.items()
            }
            right = {name: np.arange(QUESTIONS) < QUESTIONS * (0.5 + gain) for name, gain in gains.items()}
            return {name: runs.Answers(found, 1.0) for name, found in right.items()}

        monkeypatch.setattr(search, "measure", measure)
        about = dict.fromkeys(("weights", "device", "torch", "transformers", "commit", "date"), "made up")
        monkeypatch.setattr(search, "provenance", lambda model, split: {"split": split, **about})
        monkeypatch.setattr(search, "work_folder", lambda work, *about: work)
        out = tmp_path / "search.csv"
        search.main(["--limit", str(QUESTIONS), "--work", str(tmp_path), "--out", str(out)])
        with out.open(newline="") as file:
            return list(csv.DictReader(file))

    return run


def chosen(rows: list[dict[str, str]]) -> dict[str, str]:
    """The alternative that stays of every factor, the second sweep last."""
    return {row["factor"]: row["alternative"] for row in rows if row["chosen"] == "True"}


def test_the_best_alternative_stays(searched):
    stays = chosen(searched({"where=both": 0.1, "steps=2": 0.05, "margin=0.3": 0.2}))
    assert (stays["where"], stays["steps per merge"], stays["margin"]) == ("where=both", "steps=2", "margin=0.3")
    assert stays["metric"] == "metric=keys"  # nothing better: the paper's


def test_of_the_nearly_best_the_first_stays(searched, monkeypatch):
    monkeypatch.setattr(search, "TIE", 0.05)
    assert chosen(searched({"schedule=delayed": 0.04}))["schedule, first and last merging block"] == "schedule=equal"
    assert chosen(searched({"schedule=delayed": 0.08}))["schedule, first and last merging block"] == "schedule=delayed"


def test_rows_tell_the_gain_over_the_setting_before(searched):
    rows = searched({"where=both": 0.25})
    assert len([row for row in rows if row["factor"] == "where"]) == 3 * (1 + len(search.KEEPS))
    row = next(r for r in rows if (r["factor"], r["alternative"], r["keep"]) == ("where", "where=both", "0"))
    assert (float(row["value"]), float(row["difference"])) == (0.75, 0.25)
    assert {row["sweep"] for row in rows} == {"1", "2"}
    text = tables.ablation(rows)
    assert "| 1 | where | where=both | yes | 75.0 | +25.0 |" in text


@pytest.mark.parametrize("factor", search.FACTORS)
def test_every_alternative_can_be_planned_at_every_keep(factor):
    place = {"where": "both"} if factor == "tokens out of the tower" else {}
    for alternative in search.FACTORS[factor]:
        for keep in search.KEEPS:
            asked = Settings().changed(**search.START, **place, **alternative, keep=keep)
            assert make_plan(asked, GEOMETRY).keep == keep


def test_alternatives_that_do_not_go_with_the_rest_are_left_out(searched):
    better = {"where=tower": 0.1, "tower_keep=0.5": 0.2}
    rows = searched(better)
    assert {r["alternative"] for r in rows if r["factor"] == "tokens out of the tower"} == {"tower_keep=None"}
    assert chosen(searched({**better, "where=both": 0.2}))["tokens out of the tower"] == "tower_keep=0.5"


def test_the_default_is_what_the_search_found():
    """The preset says no more and no less than the recorded search, but for what makes its merges few."""
    with search.RESULTS.open(newline="") as file:
        final = [row for row in csv.DictReader(file) if row["chosen"] == "True"][-1]
    found = search.json.loads(final["settings"]) | {"merges": 6, "steps": 1}
    for told_elsewhere in ("method", "smooth"):  # the latter is gone; the search left it at the paper's
        found.pop(told_elsewhere)
    preset = METHODS[DEFAULT_METHOD]
    tuned = {**preset.options, **preset.settings}
    plain = make_plan(Settings().changed(method="pitome", keep=144), GEOMETRY)
    for name, value in found.items():
        usual = getattr(plain.reducer, name, DEFAULTS.get(name))
        assert tuned.pop(name, usual) == value, name
    assert not tuned


def test_the_recorded_search_asked_what_the_code_asks():
    """What the code no longer asks may be among the records."""
    rows = documents.read(search.RESULTS, search.COMMAND)
    asked = {(row["sweep"], row["factor"], row["alternative"]) for row in rows}
    every = {(sweep, factor) for sweep, factors in (("1", search.FACTORS), ("2", search.AGAIN)) for factor in factors}
    for sweep, factor in every:
        assert {name for *key, name in asked if key == [sweep, factor]} >= set(
            map(search.label, search.FACTORS[factor])
        )
    assert {row["questions"] for row in rows} == {"3360"} and {row["split"] for row in rows} == {"validation"}
    assert {row["weights"] for row in rows} == {runs.provenance("tiny", "validation")["weights"]}


def test_the_recorded_costs_are_of_every_setting():
    rows = costs.stored(costs.RESULTS)
    measured = {(row["shape"], row["method"], row["where"], int(row["keep"])) for row in rows}
    wanted = {(shape, s.method, s.where, s.keep) for shape, s in product(costs.SHAPES, every_setting(rows))}
    assert measured == wanted and len(rows) == len(wanted)


# ---- several settings at a time --------------------------------------------------------------------------------------


def test_in_several_processes_as_in_one(tmp_path):
    jobs = {"plain": None, "tome": {"method": "tome", "keep": 36}, "random": {"method": "random", "keep": 36}}
    alone = runs.measure(jobs, "tiny", "test", 32, tmp_path / "alone", processes=1)
    together = runs.measure(jobs, "tiny", "test", 32, tmp_path / "together", processes=2)
    assert all(np.array_equal(alone[name].right, together[name].right) for name in jobs)
    assert len({found.right.tobytes() for found in alone.values()}) == 3
    assert all(found.seconds > 0 for found in alone.values())


def test_a_failing_job_is_an_error_and_leaves_no_file(tmp_path, monkeypatch):
    """The jobs that wait are not run first: here those that run wait until the others are cancelled."""
    cancelled, begun = threading.Event(), []

    class Threads(ThreadPoolExecutor):
        def __init__(self, processes, *_):
            super().__init__(processes)

        def shutdown(self, wait=True, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            cancelled.set()
            super().shutdown(wait)

    def answers(model, settings, split, limit):
        if settings["method"] == "pitom":
            raise ValueError("unknown method 'pitom'")
        begun.append(settings)
        assert cancelled.wait(60)
        return runs.Answers(np.ones(3, bool), 1.0)

    monkeypatch.setattr(runs, "ProcessPoolExecutor", Threads)
    monkeypatch.setattr(runs, "answers", answers)
    jobs = {"wrong": {"method": "pitom"}} | {f"right {i}": {"method": "random", "seed": i} for i in range(40)}
    with pytest.raises(ValueError, match="pitom"):
        runs.measure(jobs, "tiny", "test", 16, tmp_path, processes=2)
    assert len(begun) <= 2 and list(tmp_path.iterdir()) == []


def test_finished_runs_belong_to_weights_split_limit_and_code(monkeypatch, tmp_path):
    def folder(split="test", limit=None):
        return runs.work_folder(tmp_path, "curves", "tiny", split, limit)

    one = folder()
    assert one == folder() and one.parent == tmp_path
    assert len({one, folder(limit=9), folder("validation")}) == 3
    with monkeypatch.context() as other:
        other.setattr("transformers.__version__", "5.99")
        assert folder() != one
    name = runs.run_name("tome", {"method": "tome", "keep": 72})
    assert name == runs.run_name("tome", {"method": "tome", "keep": 72})
    monkeypatch.setattr(runs, "sources", lambda method: [tmp_path / "changed.py"])
    (tmp_path / "changed.py").write_text("changed")
    assert name != runs.run_name("tome", {"method": "tome", "keep": 72})


# ---- costs, and who is measured where --------------------------------------------------------------------------------


def test_methods_are_measured_at_all_places_they_can_take():
    made = list(settings(["tome", "visionzip", DEFAULT_METHOD], ["tower", "projector", "both"], [144], GEOMETRY))
    assert {s.where for s in made if s.method == "visionzip"} == {"tower", "projector"}
    assert {s.where for s in made if s.method == "tome"} == {"tower", "projector", "both"}
    assert [s.where for s in made if s.method == DEFAULT_METHOD] == ["tower", "projector", "both"]


@dataclass(frozen=True)
class Clock:
    """A thread clock that advances by one millisecond a look."""

    looks: list[int]

    def __call__(self) -> float:
        self.looks.append(1)
        return len(self.looks) / 1000


def test_costs_name_what_was_timed(monkeypatch):
    monkeypatch.setattr(latency.time, "thread_time", Clock([]))
    wanted = [
        Setting("tome", "tower", 144),
        Setting("visionzip", "projector", 144),
        Setting("downsample", "tower", 144),
    ]
    found = list(costs.costs("tiny", wanted, 3))
    assert [cost.merges for cost in found] == [6, 1, 0]
    assert all((cost.ms, cost.p20, cost.p80, cost.repeats) == (1.0, 1.0, 1.0, 3) for cost in found)


@pytest.mark.parametrize(
    "method,where,expected",
    [
        ("tome", "tower", {"read": 6, "project": 0, "shrink": 0, "match": 6}),  # keys of every block
        ("pitome-tuned", "both", {"read": 0, "project": 0, "shrink": 0}),  # hidden states
        ("visionzip", "projector", {"read": 1, "project": 0, "shrink": 0, "match": 1}),
        ("divprune", "projector", {"read": 0, "project": 1, "shrink": 0, "match": 1}),  # looks at what it gives
        ("downsample", "tower", {"read": 0, "project": 0, "shrink": 1, "match": 0}),
    ],
)
def test_costs_run_all_that_merging_adds(monkeypatch, method, where, expected):
    plan = make_plan(Settings().changed(method=method, where=where, keep=144), GEOMETRY)
    picture, calls = costs.Picture(plan, costs.config_of("tiny")), dict.fromkeys(expected, 0)

    def count(name, function):
        def counted(*args, **kwargs):
            calls[name] = calls.get(name, 0) + 1
            return function(*args, **kwargs)

        return counted

    monkeypatch.setattr(Run, "read", count("read", Run.read))
    monkeypatch.setattr(costs, "smaller_picture", count("shrink", costs.smaller_picture))
    monkeypatch.setattr(picture.projector, "forward", count("project", picture.projector.forward))
    monkeypatch.setattr(type(plan.reducer), "match", count("match", type(plan.reducer).match))
    picture.merge()
    assert {name: calls[name] for name in expected} == expected


def test_every_method_can_be_timed_with_published_widths():
    config = costs.config_of("llava-1.5-7b")
    from pitome_mllm.families.geometry import geometry

    assert geometry(config).patches == 576 and geometry(config).merging_blocks == 23
    for setting in settings(["pitome-tuned", "mctf", "divprune"], ["projector", "both"], [64], geometry(config)):
        (cost,) = costs.costs("llava-1.5-7b", [setting], 1)
        assert cost.ms > 0 and cost.merges >= 1
