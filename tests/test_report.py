"""README and docs say what was measured."""

import shutil
from pathlib import Path

import pytest

from pitome_mllm_eval import report

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


def test_a_figure_that_was_not_measured_is_replaced(copied):
    readme = copied / "README.md"
    text = readme.read_text()
    readme.write_text(text.replace("| plain | - |", "| plain | 99.9 |"))
    report.main(["--root", str(copied), "--no-plots"])
    assert readme.read_text() == text


def test_plots_are_drawn_of_what_was_measured(tmp_path):
    report.plots(tmp_path)
    assert {"accuracy.png"} <= {path.name for path in tmp_path.iterdir()} <= {"accuracy.png", "spectra.png"}
