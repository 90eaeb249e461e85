"""The search for the best PiToMe: what it takes, at which price, and what it says."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from pitome_mllm_eval.accuracy import runs, search, tables

QUESTIONS = 320


@pytest.fixture
def searched(tmp_path, monkeypatch):
    """Run the search where an answer is right with a chance that the settings decide; ``better`` says by how much."""
    monkeypatch.setattr(search, "teraflops", lambda **settings: 1 + (settings.get("schedule") == "delayed"))
    monkeypatch.setattr(search, "launches", lambda settings: 100)

    def run(better: dict[str, float]) -> list[dict[str, str]]:
        def measure(asked, wanted, jobs):
            assert (asked.split, asked.limit) == ("validation", QUESTIONS)
            for place, job in enumerate(wanted):
                gain = sum(better.get(search.label({key: value}), 0.0) for key, value in job.items())
                yield place, runs.Answers(np.arange(QUESTIONS) % 20 < 20 * (0.5 + gain), 1.0)

        monkeypatch.setattr(search, "measure", measure)
        out = tmp_path / "search.csv"
        search.main(["--questions", str(QUESTIONS), "--out", str(out)])
        with out.open(newline="") as file:
            return list(csv.DictReader(file))

    return run


def taken(rows: list[dict[str, str]]) -> list[str]:
    return [row["alternative"] for row in rows if row["taken"] == "True"]


def test_the_best_alternative_stays_until_none_gains(searched):
    rows = searched({"protect=0.25": 0.1, "margin=0.3": 0.2})
    assert taken(rows) == ["margin=0.3", "protect=0.25", "as it is"]
    assert json.loads(rows[-1]["settings"]) | {"protect": 0.25, "margin": 0.3} == json.loads(rows[-1]["settings"])
    row = next(row for row in rows if row["alternative"] == "margin=0.3")
    assert (float(row["value"]), float(row["gain"])) == (0.7, 0.2)
    assert "| 1 | margin | margin=0.3 | yes | yes | 70.0 | 70.0 70.0 70.0 70.0 | +20.0 |" in tables.ablation(rows)


def test_what_costs_more_has_to_gain_more(searched):
    assert taken(searched({"schedule=delayed": 0.04})) == ["as it is"]  # twice the FLOPs for less than `PRICE`
    assert taken(searched({"schedule=delayed": 0.1})) == ["schedule=delayed", "as it is"]


def test_a_gain_by_chance_is_not_taken(searched, monkeypatch):
    monkeypatch.setattr(search, "KEEPS", (72,))

    def measure(asked, wanted, jobs):
        rng = np.random.default_rng(9)
        yield from ((place, runs.Answers(rng.random(QUESTIONS) < 0.8, 1.0)) for place in range(len(wanted)))

    searched({})
    monkeypatch.setattr(search, "measure", measure)
    rows = search.one_round(1, {}, type("Args", (), {"questions": QUESTIONS, "jobs": 1}))
    assert max(row.gain for row in rows) > 0.02 and rows[0].taken


def test_the_front_is_what_nothing_beats(searched):
    rows = searched({"schedule=delayed": 0.04})
    front = {row["alternative"] for row in rows if row["front"] == "True"}
    assert "schedule=delayed" in front and "as it is" in front  # more right, and cheaper


def test_each_round_asks_every_other_setting_that_can_be_had():
    first = search.alternatives({})
    assert ("where", "where=projector") in first and ("merge points", "merges=6") not in first  # that is the default
    assert not any(name == "merges=3" for _, name in search.alternatives({"where": "projector"}))
    assert ("metric", "metric=hidden") in search.alternatives({"metric": "keys"})  # the way back
    told = {"merges": 3, "place": "end", "margin": None}
    found = search.alternatives(told)
    assert found["", "as it is"] == told and found["place in a block", "place=mid"] == {**told, "place": "mid"}
    assert found["where", "where=projector"] == {"where": "projector", "margin": None}  # where no block merges


def test_launches_count_what_runs():
    few, many = (search.launches({"keep": 72, "where": "tower", "merges": points}) for points in (3, 6))
    assert 100 < few < many
