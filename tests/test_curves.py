"""The accuracy curves: what is measured, its intervals, resuming, and the table made from it."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace

import numpy as np
import pytest

from pitome_mllm import METHODS
from pitome_mllm.families.geometry import Geometry
from pitome_mllm_eval import documents, provenance
from pitome_mllm_eval.accuracy import curves, runs, tables
from pitome_mllm_eval.accuracy.curves import Rows, Setting
from pitome_mllm_eval.accuracy.gates import check_whole, every_setting, gates, table
from pitome_mllm_eval.benchmark.bootstrap import Bootstrap
from pitome_mllm_eval.benchmark.questions import CATEGORIES, Question

GEOMETRY = Geometry(grid=(24, 24), class_tokens=1, visible_class_tokens=0, merging_blocks=6, blocks=7)


def test_every_combination_that_exists():
    made = list(curves.settings(["pitome", "pool"], curves.PLACES, [144, 7], GEOMETRY))
    assert Setting("pitome", "both", 144) in made and Setting("pool", "tower", 144) in made
    assert not any(s.method == "pool" and s.where == "both" for s in made)  # it pools in one step
    assert Setting("pitome", "tower", 7) not in made  # 6 halvings leave at least 9


def test_the_interval_is_that_of_pictures_not_of_questions():
    """Sixteen copies of one answer per picture say no more than one answer per picture."""
    rng = np.random.default_rng(0)
    right = rng.random(100) < 0.7
    single = Bootstrap(np.arange(100))(right.astype(float), np.ones(100, bool))
    copied = Bootstrap(np.arange(100).repeat(16))(right.repeat(16).astype(float), np.ones(1600, bool))
    assert copied == pytest.approx(single)
    value, low, high = single
    assert value == right.mean()
    deviation = np.sqrt(value * (1 - value) / 100)
    assert low == pytest.approx(value - 1.96 * deviation, abs=0.02)
    assert high == pytest.approx(value + 1.96 * deviation, abs=0.02)


def test_differences_are_paired():
    """Two runs that miss the same questions but one differ by little, however hard the questions are."""
    rng = np.random.default_rng(1)
    plain = rng.random(300) < 0.5
    other = plain.copy()
    other[np.flatnonzero(plain)[0]] = False
    _, low, high = Bootstrap(np.arange(300))(other.astype(float) - plain, np.ones(300, bool))
    assert -0.02 < low <= high <= 0


def test_a_group_that_a_draw_misses_is_left_out_of_that_draw():
    mask = np.array([True, False, False])
    assert Bootstrap(np.arange(3))(np.ones(3), mask) == (1, 1, 1)


MARKS = documents.marks("accuracy", "make report")


@dataclass(frozen=True)
class Record:
    right: bool


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Run the command on 32 questions with answers by dice; returns the command and how often it asked."""
    asked = []

    def score(model, processor, split, limit):
        asked.append(limit)
        rng = np.random.default_rng(len(asked))
        yield from (Record(bool(rng.random() < 0.6)) for _ in range(limit))

    monkeypatch.setattr(runs, "score", score)
    out = tmp_path / "curves.csv"

    def run(*extra: str) -> list[dict[str, str]]:
        common = ["--limit", "32", "--work", str(tmp_path / "work"), "--out", str(out), "--processes", "1"]
        curves.main([*common, "--methods", "pitome", "tome", "--where", "tower", "--keep", "144", *extra])
        with out.open(newline="") as file:
            return list(csv.DictReader(file))

    return run, asked


def test_a_second_run_asks_only_what_is_missing(measured):
    run, asked = measured
    first = run()
    assert len(asked) == 3  # plain, pitome, tome
    assert run() == first and len(asked) == 3
    timed = {row["method"] for row in first if row["seconds"]}
    assert timed == {"plain", "pitome", "tome"} and not any(row["seconds"] for row in first if row["against"])
    run("288")  # another keep: two runs more
    assert len(asked) == 5


def test_another_method_makes_nothing_anew(measured, monkeypatch):
    """Finished runs are known by the files of their own method, not by all of them, nor by how many there are."""
    run, asked = measured
    run()
    monkeypatch.setitem(METHODS, "mine", replace(METHODS["tome"], summary="another one"))
    run()
    assert len(asked) == 3
    monkeypatch.setitem(METHODS, "tome", replace(METHODS["tome"], settings={"order": "source"}))
    run()
    assert len(asked) == 4  # tome alone
    names = {path.name for path in runs.sources("pitome-llava")}
    assert {"pitome.py", "tome.py", "staged.py", "scenes.py"} <= names and not names & {"dart.py", "cli.py", "ask.py"}


def test_rows_name_what_they_compare(measured):
    run, _ = measured
    rows = run()
    assert all(row["commit"] == provenance.commit() for row in rows)
    kinds = {(row["method"], row["against"]) for row in rows if row["group"] == "all"}
    assert kinds == {
        ("plain", ""),
        ("blind", ""),
        ("pitome", ""),
        ("pitome", "plain"),
        ("tome", ""),
        ("tome", "plain"),
    }
    figure = {(row["method"], row["against"]): float(row["value"]) for row in rows if row["group"] == "all"}
    assert figure["tome", "plain"] == pytest.approx(figure["tome", ""] - figure["plain", ""], abs=2e-4)
    assert all(row["weights"] and row["torch"] and row["date"] for row in rows)


def test_the_control_is_compared_with_tome(measured):
    run, _ = measured
    rows = [row for row in run("--methods", "tome", "random") if row["against"] == "tome"]
    assert [(row["method"], row["where"], row["group"]) for row in rows] == [("random", "tower", "all")]


def test_the_table_is_made_from_the_file(measured, tmp_path):
    run, _ = measured
    rows = run()
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    documents.put_in(readme, tables.table(rows, {}), MARKS)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    value = next(r["value"] for r in rows if (r["method"], r["group"], r["against"]) == ("tome", "all", ""))
    assert f"| tome | tower | no | not measured | {100 * float(value):.1f} (" in text
    change = next(r for r in rows if (r["method"], r["group"], r["against"]) == ("tome", "all", "plain"))
    low, high = (100 * float(change[name]) for name in ("low", "high"))
    assert f"{100 * float(value):.1f} ({low:+.1f} to {high:+.1f})" in text
    documents.put_in(readme, tables.table(rows, {}), MARKS)
    assert readme.read_text() == text


def test_a_readme_without_marks_is_refused(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="once"):
        documents.put_in(readme, "table", MARKS)


def test_missing_results_say_how_to_measure(tmp_path):
    with pytest.raises(ValueError, match=r"measure first: python -m pitome_mllm_eval\.accuracy\.curves"):
        curves.results(tmp_path / "none.csv")
    (tmp_path / "old.csv").write_text("method,value\ntome,1\n")
    with pytest.raises(ValueError, match="does not hold results of today's"):
        curves.results(tmp_path / "old.csv")


def test_the_spread_is_that_of_the_categories_that_lose_most_and_least():
    """Its interval is that of a difference: categories that err on the same pictures narrow it."""
    pictures = 60
    asked = [(n, Question("what", "a", c, "easy")) for n in range(pictures) for c in ("colour", "digit", "count")]
    hard = np.random.default_rng(0).random(pictures) < 0.5
    lost = np.stack([np.zeros(pictures, bool), np.ones(pictures, bool), hard], 1).ravel()
    (row,) = Rows(asked).spread(Setting("random", "tower", 72), ~lost, np.ones(len(lost), bool))
    assert (row.group, row.against, row.value, row.low, row.high) == ("colour - digit", "plain", 1, 1, 1)
    assert row.questions == 2 * pictures
    both = np.stack([hard, hard, np.zeros(pictures, bool)], 1).ravel()
    categories = np.array([q.category for _, q in asked])
    same = Bootstrap(np.array([n for n, _ in asked]))(~both * 1.0, categories == "colour", less=categories == "digit")
    assert same == (0, 0, 0)


@pytest.mark.parametrize(
    "part", [["--limit", "9"], ["--keep", "144"], ["--methods", "tome"], ["--split", "validation"]]
)
def test_part_of_the_benchmark_does_not_replace_the_results(part, capsys):
    with pytest.raises(SystemExit):
        curves.main(part)
    assert "say with --out" in capsys.readouterr().err


def test_only_results_of_a_checkout_are_replaced(tmp_path, monkeypatch):
    installed = tmp_path / "pitome_mllm_eval" / "results" / "a.csv"
    provenance.check_out(tmp_path / "a.csv", installed, whole=False)
    monkeypatch.setattr(provenance, "commit", lambda: "c")
    provenance.check_out(curves.RESULTS, curves.RESULTS, whole=True)
    monkeypatch.setattr(provenance, "commit", lambda: "c-dirty")
    with pytest.raises(ValueError, match="commit first"):
        provenance.check_out(curves.RESULTS, curves.RESULTS, whole=True)
    with pytest.raises(ValueError, match="no file of a checkout"):
        provenance.check_out(installed, installed, whole=True)


def test_the_plot_has_a_panel_for_each_place_and_a_line_for_each_method(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(documents, "save", lambda figure, path, lines: drawn.append((figure, lines)))
    rows = [row | {"group": "all"} for row in results(0.5) if row["group"] == "all"]
    rows += [result("tome", "both", keep, "all", 0.7) for keep in (72, 288)]
    tables.plot(rows, tmp_path / "plot.png")
    ((figure, lines),) = drawn
    assert [axis.get_title() for axis in figure.axes] == ["tower", "both"]
    assert list(lines) == ["plain, 576 tokens", "tome", "random"]


def result(method: str, where: str, keep: int, group: str, value: float, against: str = "") -> dict[str, str]:
    figures = {"value": str(value), "low": str(value - 0.02), "high": str(value + 0.02), "seconds": "11.5"}
    about = {"split": "test", "questions": "3360", "weights": "w", "commit": "c"}
    place = {"method": method, "where": where, "keep": str(keep)}
    return {**place, "group": group, "against": against, **figures, **about}


MEASURED = {Setting("tome", "tower", 72), Setting("random", "tower", 72), Setting("random", "tower", 288)}


def results(random: float) -> list[dict[str, str]]:
    names = ["all", *CATEGORIES]
    rows = [result("plain", "none", 576, name, 0.92) for name in names]
    rows += [result("blind", "none", 0, name, 0.4) for name in names]
    rows += [result("tome", "tower", 72, name, 0.86) for name in names]
    for name in names:
        right = random + 0.2 * (name == "colour")
        rows += [result("random", "tower", 72, name, right), result("random", "tower", 72, name, right - 0.92, "plain")]
    rows.append(result("random", "tower", 72, "all", random - 0.86, "tome"))
    rows.append(result("random", "tower", 72, "colour - digit", 0.2, "plain"))
    return rows + [result("random", "tower", 288, name, 0.8) for name in names]


@pytest.mark.parametrize("random,passes", [(0.5, True), (0.85, False)])
def test_gates_fail_where_a_bad_reducer_does_not_show(random, passes):
    rows = results(random)
    checked = list(gates(rows))
    assert len(checked) == 1 + 7 + 1 + 3 + 7 + 1
    assert all(gate.passed for gate in checked) is passes
    rows[-1]["low"] = "0.3"  # at chance
    assert not list(gates(rows))[-2].passed
    rows[-1]["seconds"] = "301"
    assert not list(gates(rows))[-1].passed


def test_gates_show_the_interval_the_right_way_round():
    shown = {gate.name: gate for gate in gates(results(0.5))}
    for name, value in (("plain - random", 42), ("tome - random", 36), ("change of colour - digit, random", 20)):
        gate = shown[f"{name}, tower, keep 72"]
        assert gate.value == pytest.approx(value) and gate.interval == pytest.approx((value - 2, value + 2))


def test_the_recorded_results_are_whole_and_pass_every_gate():
    found = curves.results()
    check_whole(found, every_setting(found))
    assert [gate.name for gate in gates(found) if not gate.passed] == []


def test_gates_are_about_every_place_of_the_methods_that_were_measured(monkeypatch):
    found = curves.results()
    wanted = every_setting(found)
    assert {Setting("tome", "tower", 72), Setting("visionzip", "tower", 288)} < wanted
    monkeypatch.setitem(METHODS, "mine", METHODS["tome"])
    assert every_setting(found) == wanted


def test_the_summary_is_the_part_over_all_questions():
    whole = [row for row in curves.results() if row["group"] == "all"]
    assert curves.results(curves.RESULTS.with_name(curves.SUMMARY)) == whole


def test_the_table_of_gates_shows_the_closest_of_those_at_chance():
    lines = table(results(0.5)).splitlines()
    assert "| blind, all | 40.0 | 38.0 to 42.0 | at most 45 | passes |" in lines
    assert (
        "| low end of random-tower-288 - blind, existence (the closest of 7) | 38.0 |  | at least 0 | passes |" in lines
    )
    assert len(lines) == 2 + 1 + 7 + 1 + 3 + 1 + 1


@pytest.mark.parametrize(
    "change, words",
    [({"weights": "x"}, "got weights w, x"), ({"commit": ""}, "'none'"), ({"commit": "c-dirty"}, "c-di")],
)
def test_gates_refuse_results_of_several_models_or_of_no_clean_commit(change, words):
    rows = results(0.5)
    rows[0] = rows[0] | change
    with pytest.raises(ValueError, match=words):
        check_whole(rows, set())
    check_whole([row | {"commit": "d"} if row["method"] == "tome" else row for row in results(0.5)], MEASURED)


def test_gates_refuse_runs_without_a_category():
    rows = [row for row in results(0.5) if (row["keep"], row["group"]) != ("288", "digit")]
    with pytest.raises(ValueError, match="every category of every run; got 4 of 5 for digit"):
        check_whole(rows, set())


@pytest.mark.parametrize(
    "change", [{"split": "validation"}, {"questions": "200"}, {"keep": "144"}, {"method": "pitome"}]
)
def test_gates_refuse_part_of_the_results(change):
    wanted = MEASURED
    check_whole(results(0.5), wanted)
    with pytest.raises(ValueError, match="whole test set"):
        check_whole([row | change for row in results(0.5)], wanted)
    with pytest.raises(ValueError, match="missing tome-tower-144,"):
        check_whole(results(0.5), wanted | {Setting("tome", "tower", 144)})
