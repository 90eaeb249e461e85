"""The accuracy curves: intervals, what is measured and taken up again, figures, gates, and tables made from them."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import numpy as np
import pytest

from pitome_mllm import METHODS
from pitome_mllm_eval import documents, provenance
from pitome_mllm_eval.accuracy import curves, figures, runs, tables
from pitome_mllm_eval.accuracy.curves import Setting
from pitome_mllm_eval.benchmark.bootstrap import Bootstrap
from pitome_mllm_eval.benchmark.questions import CATEGORIES, Question

QUESTIONS = 32


# ---- intervals -------------------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_pictures_not_of_questions():
    """Sixteen copies of one answer per picture say no more than one answer per picture."""
    rng = np.random.default_rng(0)
    right = rng.random(100) < 0.7
    single = Bootstrap(np.arange(100))(right.astype(float), np.ones(100, bool))
    copied = Bootstrap(np.arange(100).repeat(16))(right.repeat(16).astype(float), np.ones(1600, bool))
    assert copied == pytest.approx(single)
    value, low, high = single
    deviation = np.sqrt(value * (1 - value) / 100)
    assert value == right.mean()
    assert (low, high) == pytest.approx((value - 1.96 * deviation, value + 1.96 * deviation), abs=0.02)
    wider = Bootstrap(np.arange(100))(right.astype(float), np.ones(100, bool), level=0.999)
    assert wider[1] < low < high < wider[2]


def test_differences_are_paired():
    """Two runs that miss the same questions but one differ by little, however hard the questions are."""
    plain = np.random.default_rng(1).random(300) < 0.5
    other = plain.copy()
    other[np.flatnonzero(plain)[0]] = False
    _, low, high = Bootstrap(np.arange(300))(other.astype(float) - plain, np.ones(300, bool))
    assert -0.02 < low <= high <= 0


def test_a_group_that_a_draw_misses_is_left_out_of_that_draw():
    mask = np.array([True, False, False])
    assert Bootstrap(np.arange(3))(np.ones(3), mask) == (1, 1, 1)


# ---- measuring -------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Run the command with answers by dice; returns the command, and the settings that were asked for."""
    asked = []

    def answers(about, settings):
        asked.append(settings)
        right = np.random.default_rng(len(asked)).random(about.limit) < 0.6
        return runs.Answers(right, 1.0)

    monkeypatch.setattr(runs, "answers", answers)

    def run(*extra: str) -> list[dict[str, str]]:
        common = ["--questions", str(QUESTIONS), "--out", str(tmp_path / "curves.csv")]
        curves.main([*common, "--methods", "tome", "downsample", "--keeps", "144", *extra])
        with (tmp_path / "curves.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    return run, asked


def test_a_second_run_asks_only_what_is_missing(measured, monkeypatch):
    run, asked = measured
    rows = run()
    names = [(row["method"], row["published"], row["keep"]) for row in rows]
    assert names == [
        ("plain", "False", "576"),
        ("blind", "False", "0"),
        *(("tome", said, "144") for said in ("True", "False")),
        *(("downsample", said, "144") for said in ("True", "False")),
    ]
    assert run() == rows and len(asked) == 5
    assert len(run("--keeps", "72", "144")) == 10 and len(asked) == 9
    monkeypatch.setattr(curves, "code", lambda: "another")
    run("--methods", "tome")
    assert len(asked) == 12  # with the plain model; the other method stays as it was


def test_what_is_recorded_is_what_was_answered(measured, tmp_path):
    run, _ = measured
    rows = run()
    plain = curves.unpacked(rows[0])
    assert plain.tolist() == (np.random.default_rng(1).random(QUESTIONS) < 0.6).tolist()
    assert all(row["weights"] and row["torch"] and row["date"] and row["device"] for row in rows)
    told = curves.summary(tmp_path / curves.SUMMARY)
    assert [float(row["value"]) for row in told] == pytest.approx([curves.unpacked(r).mean() for r in rows], abs=1e-6)


def test_rows_of_other_questions_are_not_mixed(measured, capsys):
    run, _ = measured
    run()
    with pytest.raises(SystemExit):
        run("--questions", "16")
    assert "choose another --out" in " ".join(capsys.readouterr().err.split())


def test_the_time_limit_ends_a_run_and_what_is_done_is_kept(measured, monkeypatch):
    run, asked = measured
    clock = iter([0, 0, 0, *[100] * 9])
    monkeypatch.setattr(curves, "time", SimpleNamespace(monotonic=lambda: 0))
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert len(run("--seconds", "50")) == 3 and len(asked) == 2  # blind, plain, one run


def test_in_several_processes_as_in_one():
    asked = runs.QuestionSet("tiny", "test", 32)
    wanted = [None, {"method": "tome", "keep": 36}, {"method": "random", "keep": 36}]
    alone = dict(runs.measure(asked, wanted))
    together = dict(runs.measure(asked, wanted, jobs=2))
    assert all(np.array_equal(alone[place].right, together[place].right) for place in range(3))
    assert len({found.right.tobytes() for found in alone.values()}) == 3


@pytest.mark.parametrize("part", [["--questions", "9"], ["--split", "validation"]])
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


def test_missing_results_say_how_to_measure(tmp_path):
    with pytest.raises(ValueError, match=r"measure first: python -m pitome_mllm_eval\.accuracy\.curves"):
        curves.results(tmp_path / "none.csv")
    (tmp_path / "old.csv").write_text("method,value\ntome,1\n")
    with pytest.raises(ValueError, match="does not hold results of today's"):
        curves.results(tmp_path / "old.csv")


# ---- figures, gates, tables ------------------------------------------------------------------------------------------


def asked(pictures: int = 60) -> list[tuple[int, Question]]:
    return [(number, Question("what", "a", category, "easy")) for number in range(pictures) for category in CATEGORIES]


def answers(**shares: float) -> dict[tuple[str, bool, int], np.ndarray]:
    """Answers of which the first so many per cent are right; names are of methods, with keep and "pub" or "lib"."""
    count, found = len(asked()), {}
    for name, share in {"plain_lib_576": 95, "blind_lib_0": 30, **shares}.items():
        method, table, keep = name.split("_")
        found[method, table == "pub", int(keep)] = np.random.default_rng(0).permutation(count) < count * share / 100
    return found


def test_group_a_are_the_questions_that_downsampling_loses():
    right = answers(downsample_pub_72=50, tome_pub_72=80, tome_pub_36=70)
    found = dict(zip(right, figures.figures(right, asked()), strict=True))
    tome, down = found["tome", True, 72], found["downsample", True, 72]
    hard = right["plain", False, 576] & ~right["downsample", True, 72]
    assert tome["group_a_questions"] == hard.sum()
    assert tome["group_a"] == pytest.approx((80 - 50) / (95 - 50), abs=0.01) and down["group_a"] == 0
    assert found["tome", True, 36]["group_a"] == "" == found["plain", False, 576]["group_a"]
    assert tome["change"] == pytest.approx(-0.15, abs=0.01)
    assert tome["change_low"] <= tome["change"] <= tome["change_high"]


def test_gates_fail_where_a_bad_reducer_does_not_show():
    def failed(**shares):
        return {gate.name for gate in figures.gates(answers(**shares), asked()) if not gate.passed}

    spread = {name for name in failed(random_pub_72=50, tome_pub_72=70) if "loss of" not in name}
    assert spread == set()
    assert {"plain - random, keep 72", "tome - random, keep 72"} <= failed(random_pub_72=90, tome_pub_72=90)
    assert "plain, all" in failed(plain_lib_576=80) and "blind, all" in failed(blind_lib_0=60)


def test_gates_hold_the_default_and_tome_beside_it_to_their_bounds():
    good = answers(pitome_lib_72=93, tome_lib_72=92)
    assert {gate.name for gate in figures.gates(good, asked()) if not gate.passed} == set()
    bad = [gate for gate in figures.gates(answers(pitome_lib_72=90, tome_lib_72=88), asked()) if not gate.passed]
    assert [gate.name for gate in bad] == ["plain - pitome, keep 72", "pitome - tome, library defaults, keep 72"]
    assert bad[0].low <= bad[0].value <= bad[0].high
    assert "| plain - pitome, keep 72 | 5.0 |" in figures.gate_table(answers(pitome_lib_72=90), asked())


def told(**shares: float) -> list[dict[str, str]]:
    """A summary as `curves` writes it."""
    about = dict.fromkeys(("weights", "device", "torch", "transformers", "commit", "date"), "x") | {"split": "test"}
    right = answers(**shares)
    rows = []
    for (method, published, keep), found in zip(right, figures.figures(right, asked()), strict=True):
        name = {"method": method, "published": published, "where": "tower", "keep": keep, "questions": 420}
        rows.append({k: str(v) for k, v in {**name, **about, **found}.items()})
    return rows


def test_tables_say_what_was_measured_and_who_leads():
    rows = told(tome_pub_72=80, pitome_pub_72=75, downsample_pub_72=50, pitome_lib_72=90, tome_lib_72=85)
    lines = tables.table(rows, published=True).splitlines()
    (line,) = (line for line in lines if line.startswith("| tome |"))
    low, high = (
        100 * float(next(r for r in rows if r["method"] == "tome")[f"change_{end}"]) for end in ("low", "high")
    )
    assert f"| 80.0 ({low:+.1f} to {high:+.1f}) | 66.7 |" in line and "| no |" in line
    assert tables.table(rows, published=False).count(tables.NOT_MEASURED) == 2  # group A without downsample
    said = tables.leaders(rows)
    assert "| as published | tome 80.0 |\n| ... pitome | 75.0 |" in said
    assert "| under the library's defaults | pitome 90.0 |\n| ... pitome | 90.0 |" in said
    assert "the 189 questions" in " ".join(tables.about(rows).split())


def test_the_plot_has_a_panel_for_each_table_and_a_line_for_each_method(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(documents, "save", lambda figure, path, lines: drawn.append((figure, lines)))
    tables.plot(told(tome_pub_72=80, tome_lib_72=85, random_pub_144=60), tmp_path / "plot.png")
    ((figure, lines),) = drawn
    assert [axis.get_title() for axis in figure.axes] == list(tables.TABLES.values())
    assert list(lines) == ["plain, 576 tokens", "tome", "random"]


def test_the_summary_is_made_from_the_recorded_answers(tmp_path):
    found = curves.results()
    assert {row["split"] for row in found} == {"test"} and {row["questions"] for row in found} == {"3360"}
    assert all(row["commit"] and not row["commit"].endswith("-dirty") for row in found)
    documents.write_csv(tmp_path / "curves.csv", found)
    curves.summarise(tmp_path / "curves.csv")
    assert curves.summary(tmp_path / curves.SUMMARY) == curves.summary()


def test_every_method_is_measured_in_both_tables():
    model = SimpleNamespace(config=runs.load("tiny")[0].config)
    made = curves.settings(METHODS, curves.KEEPS, model)
    variants = {name for name, method in METHODS.items() if method.variant}
    assert {s.method for s in made if s.published} == {*METHODS}
    assert {s.method for s in made if not s.published} == {*METHODS} - variants
    assert Setting("pool", True, 72) in made and Setting("pool", False, 16) in made


def test_a_readme_without_marks_is_refused(tmp_path):
    marks = documents.marks("accuracy", "make report")
    readme = tmp_path / "README.md"
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="once"):
        documents.put_in(readme, "table", marks)
    readme.write_text(f"before\n{marks[0]}\nold\n{marks[1]}\nafter\n")
    documents.put_in(readme, "table", marks)
    assert readme.read_text() == f"before\n{marks[0]}\n\ntable\n\n{marks[1]}\nafter\n"
