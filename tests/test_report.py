"""README and docs say what was measured."""

import shutil
from functools import partial
from pathlib import Path

import pytest

from pitome_mllm_eval import front, report
from pitome_mllm_eval.speed import serving_report

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def copied(tmp_path):
    """A folder with copies of the README and of docs/."""
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("*.png"))
    return tmp_path


def test_documents_are_those_of_the_results(copied):
    report.main(["--root", str(copied), "--no-plots"])
    for name in report.texts():
        assert (copied / name).read_text() == (ROOT / name).read_text(), f"{name}: make report"
    assert "FAILS" not in (ROOT / "docs/accuracy.md").read_text()  # the gates of what is recorded


def test_a_figure_that_was_not_measured_is_replaced(copied):
    readme = copied / "README.md"
    text = readme.read_text()
    changed = text.replace("| 576, plain |", "| 576, plain | 99.9")
    readme.write_text(changed)
    report.main(["--root", str(copied), "--no-plots"])
    assert changed != text and readme.read_text() == text


def test_what_was_not_measured_is_said(monkeypatch, tmp_path):
    missing = {"GPU_RESULTS": tmp_path / "none.csv", "CPU_RESULTS": tmp_path / "none.csv"}
    for name, path in missing.items():
        monkeypatch.setattr(report, name, path)
    monkeypatch.setattr(report.curves, "summary", partial(report.curves.summary, tmp_path / "none.csv"))
    first = report.texts()["README.md"]
    assert "not measured yet." in first["number"]
    assert first["results"].count("not measured") == 5 * 4 and "not help" not in first["results"]


def test_the_first_screen_says_what_was_measured_and_where_nothing_is_gained():
    about = {"device": "chip", "dtype": "bfloat16", "shape": "llava", "mode": "graph", "commit": "abc"}
    times = [
        ("plain", "1", 40, 1.0),
        ("default", "1", 39, 0.975),
        ("plain", "16", 300, 1.0),
        ("pitome, 144", "16", 90, 0.3),
    ]
    gpu = [about | dict(phase="first token", what=w, batch=b, ms=str(ms), share=str(s)) for w, b, ms, s in times]
    machine = {"device": "processor", "commit": "def"}
    right = [
        {"method": name, "published": published, "keep": keep, "value": value, "questions": "3360"} | machine
        for name, published, keep, value in (
            ("plain", "False", "576", "0.97"), ("pitome", "True", "144", "0.7"), ("pitome", "False", "144", "0.964"),
            ("downsample", "False", "144", "0.6"), ("tome", "False", "144", "0.967"), ("tome", "False", "72", "0.95"),
            ("pitome", "False", "72", "0.96"),
        )
    ]  # fmt: skip
    assert "on one chip" in front.number(gpu) and "**90 ms in place of 300** (batch 16, 144 of 576" in front.number(gpu)
    text = front.table(right, gpu, [])
    assert "| 576, plain | 97.0 | 97.0 | 40 | 300 |" in text and "| 144 | 96.4 | 60.0 | not measured | 90 |" in text
    assert "`tome` at 144; `pitome` at 72 (pitome is at most 0.3 points behind)." in text
    assert "accuracy.curves`, processor, commit def)" in text and "(`make bench-gpu`, commit abc)" in text
    assert "one chip" in text and "at batch 1, 64 tokens (0.97)" in text


def test_plots_are_drawn_of_what_was_measured(tmp_path):
    report.plots(tmp_path)
    assert (
        {"accuracy.png"}
        <= {path.name for path in tmp_path.iterdir()}
        <= {"accuracy.png", "encoders.png", "serving.png", "spectra.png"}
    )


def test_the_table_of_servers_says_what_is_reached(tmp_path):
    def row(load, what, rate, first, offered=""):
        times = {"first": first, "each": 20}
        waits = {f"{name}_p{q}": str(ms * q / 95) for name, ms in times.items() for q in (50, 95, 99)}
        counts = {"requests_s": str(rate), "offered": offered, "kv_blocks": "9", "block_tokens": "16"}
        return {"load": load, "what": what, **waits, **counts}

    found = [
        row("12", "stock", 2, 6000), row("12", "64", 7, 2100), row("32", "stock", 2, 9000), row("32", "64", 3, 900),
        row("0.8", "stock", 1.6, 3000, "1.6"), row("0.8", "64", 1.6, 300, "1.6"),
    ]  # fmt: skip
    text = serving_report.table(found)
    assert "KV blocks of 16" in text
    assert "| 12 at once | 64 | 7 | 3.50 (>= 3) | 1105 / 2100 / 2188 | **0.35** (<= 0.333) |" in text
    assert "| 32 at once | 64 | 3 | 1.50 | 474 / 900 / 938 | 0.1 |" in text
    assert "| Poisson, 1.6/s | 64 | 1.6 | 1.00" in text
    serving_report.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
