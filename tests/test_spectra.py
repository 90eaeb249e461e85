"""Spectral distance against accuracy, on made-up results: joining, correlating, telling, and what is refused."""

import csv
from dataclasses import replace
from itertools import product

import pytest

from pitome_mllm import attach, load, spectral_distance
from pitome_mllm.families.features import pixel_values, tower_features
from pitome_mllm_eval.accuracy import spectra
from pitome_mllm_eval.accuracy.curves import Setting
from pitome_mllm_eval.accuracy.spectra import Loss, correlations, losses, points
from pitome_mllm_eval.benchmark.sets import scene

METHODS, PLACES, KEEPS = ("tome", "pitome", "random"), ("tower", "projector"), (400, 288, 200, 144, 100, 72, 36)


def row(method, where, keep, value, group="all", against="plain"):
    figures = {"value": str(value), "low": str(round(value - 0.01, 4)), "high": str(round(value + 0.02, 4))}
    return {
        "method": method,
        "where": where,
        "keep": str(keep),
        "group": group,
        "against": against,
        **figures,
    }


def made_up(keeps=KEEPS, weights="0a"):
    """Results in which fewer tokens lose more, and random more than the others."""
    lost = {"tome": 0.02, "pitome": 0.03, "random": 0.1}
    rows = [row(m, w, k, -lost[m] * (1 - k / 576)) for m, w, k in product(METHODS, PLACES, keeps)]
    rows += [row(m, "tower", 72, 0.8, against="") for m in METHODS] + [row("tome", "tower", 72, -0.5, group="colour")]
    rows += [row("tome", "tower", 72, 0.07, against="random")]
    rows += [row("plain", "none", 576, 0.95, against="")]
    return [r | {"split": "test", "questions": "3360", "weights": weights} for r in rows]


def test_a_loss_is_the_difference_to_the_plain_model_over_all_questions():
    found = losses(made_up())
    assert len(found) == 42 and set(found) == {Setting(*s) for s in product(METHODS, PLACES, KEEPS)}
    assert found[Setting("random", "tower", 288)] == Loss(0.05, 0.03, 0.06)


def test_too_few_settings_are_refused():
    lost = losses(made_up())
    assert len(points(dict.fromkeys(lost, 1.0), lost)) == 42
    few = dict.fromkeys(list(lost)[:39], 1.0)
    with pytest.raises(ValueError, match="39 settings says little; at least 40"):
        points(few, lost)


def test_settings_of_one_method_are_refused():
    rows = [row("tome", "tower", keep, -0.1) for keep in range(40)]
    lost = losses(rows)
    with pytest.raises(ValueError, match="all settings are of one method; measure others too"):
        points(dict.fromkeys(lost, 1.0), lost)


def test_the_correlations_are_over_methods():
    lost = losses(made_up())
    found = points({s: 0.2 + 0.01 * len(s.method) - s.keep / 5760 for s in lost}, lost)
    copies = [replace(point, where=f"{point.where} again") for point in found]
    for once, twice in zip(correlations(found), correlations(found + copies), strict=True):
        assert (twice.value, twice.low, twice.high) == pytest.approx((once.value, once.low, once.high))


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


def test_distances_are_means_over_pictures_in_batches(tiny, monkeypatch):
    monkeypatch.setattr(spectra, "BATCH", 2)
    model, processor = tiny
    pixels = pixel_values(processor, [scene(number)[0] for number in range(3)])
    setting = Setting("tome", "projector", 72)
    found = spectra.distances(model, pixels, [setting, Setting("random", "tower", 144)])
    plain = tower_features(model, pixels)
    with attach(model, "tome", keep=72, where="projector") as handle:
        tower_features(model, pixels)
        expected = spectral_distance(plain, handle.stats.merges).mean()
    assert found[setting] == pytest.approx(float(expected), abs=1e-6) and len(found) == 2


@pytest.fixture
def measured(tmp_path, monkeypatch, capsys):
    """The points of a command that has just measured made-up results, and what it said."""
    weights = spectra.provenance("tiny", "test")["weights"]
    made = {s: 0.2 + 0.01 * len(s.method) - s.keep / 5760 for s in losses(made_up())}
    with monkeypatch.context() as patch:
        patch.setattr(spectra, "results", lambda path: made_up(weights=weights))
        patch.setattr(spectra, "distances", lambda *given: made)
        spectra.main(["--pictures", "2", "--threads", "1", "--out", str(tmp_path / "spectra.csv")])
    return points(made, losses(made_up())), capsys.readouterr().out


def test_the_command_writes_points_and_says_a_sentence(measured, tmp_path):
    found, said = measured
    with (tmp_path / "spectra.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 42 and {r["pictures"] for r in rows} == {"2"}
    whole, within = correlations(found)
    assert 0 < whole.value < 1 and within.value == pytest.approx(0.75**0.5)
    assert "Over 42 settings of 3 methods Spearman's correlation" in said and f"accuracy is {whole}; " in said
    assert f"at the same number of tokens it is {within}. In brackets" in said and rows[0]["weights"] in said


def test_plot_and_sentence_come_from_the_csv(measured, tmp_path):
    found, said = measured
    stored, about = spectra.stored(tmp_path / "spectra.csv")
    assert stored == found and spectra.sentence(stored, about) == said.strip()
    spectra.plot(stored, about, tmp_path / "docs" / "spectra.png")
    assert (tmp_path / "docs" / "spectra.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "rows, arguments, words",
    [
        (made_up(keeps=(144, 72)), [], "a rank correlation of 12 settings says little"),
        (made_up(weights="other"), [], "the accuracies are of weights other"),
        (made_up(), ["--pictures", "0"], "--pictures 0 is not possible; choose 1 to 210"),
    ],
)
def test_what_cannot_be_compared_is_refused(rows, arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(spectra, "results", lambda path: rows)
    monkeypatch.setattr(spectra, "distances", lambda *given: pytest.fail("measured before checking"))
    with pytest.raises(SystemExit):
        spectra.main(arguments)
    assert words in " ".join(capsys.readouterr().err.split())
