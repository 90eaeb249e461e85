"""Spectral distance against accuracy, on made-up results: joining, the rank correlation, and what is refused."""

import csv
from itertools import product

import numpy as np
import pytest

from pitome_mllm import attach, load, spectral_distance
from pitome_mllm.features import pixel_values, tower_features
from pitome_mllm_eval import spectra
from pitome_mllm_eval.benchmark import scene
from pitome_mllm_eval.curves import Setting
from pitome_mllm_eval.spectra import Loss, Point, correlation, losses, points, ranks, spearman

METHODS, PLACES, KEEPS = ("tome", "pitome", "random"), ("tower", "projector"), (400, 288, 200, 144, 100, 72, 36)


def row(method, where, keep, value, group="all", against="plain", like=""):
    figures = {"value": str(value), "low": str(round(value - 0.01, 4)), "high": str(round(value + 0.02, 4))}
    return {
        "method": method,
        "where": where,
        "keep": str(keep),
        "group": group,
        "against": against,
        "like": like,
        **figures,
    }


def made_up(keeps=KEEPS, weights="0a"):
    """Results in which fewer tokens lose more, and random more than the others."""
    lost = {"tome": 0.02, "pitome": 0.03, "random": 0.1}
    rows = [row(m, w, k, -lost[m] * (1 - k / 576)) for m, w, k in product(METHODS, PLACES, keeps)]
    rows += [row(m, "tower", 72, 0.8, against="") for m in METHODS] + [row("tome", "tower", 72, -0.5, group="colour")]
    rows += [row("tome", "tower", 72, -0.4, like="pitome"), row("tome", "tower", 72, 0.07, against="random")]
    rows += [row("plain", "none", 576, 0.95, against="")]
    return [r | {"split": "test", "questions": "3360", "weights": weights} for r in rows]


def test_a_loss_is_the_difference_to_the_plain_model_over_all_questions():
    found = losses(made_up())
    assert len(found) == 42 and set(found) == {Setting(*s) for s in product(METHODS, PLACES, KEEPS)}
    assert found[Setting("random", "tower", 288)] == Loss(0.05, 0.03, 0.06)


def test_ranks_share_ties():
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0, 2.5, 1]


def test_spearman_on_cases_worked_by_hand():
    x = np.array([1.0, 2, 3, 4, 5])
    assert spearman(x, x**3) == pytest.approx(1) and spearman(x, -x) == pytest.approx(-1)
    assert spearman(x, np.array([2.0, 1, 4, 3, 5])) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert np.isnan(spearman(x, np.ones(5)))


def test_spearman_within_strata_leaves_out_what_strata_explain():
    keep = np.repeat([1.0, 2, 3], 4)
    x, y = 10 * keep + np.tile([1, 2, 3, 4], 3), 10 * keep + np.tile([4, 3, 2, 1], 3)
    assert spearman(x, y) > 0.7 and spearman(x, y, keep) == pytest.approx(-1)


def test_equal_values_share_the_mean_of_their_ranks():
    x, y = np.array([1.0, 2, 2, 3]), np.array([1.0, 2, 3, 4])
    assert spearman(x, y) == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1])


def made_points(strength, count=60, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=count)
    y = strength * x + rng.normal(size=count)
    return [Point("m", "tower", 72, *pair, 0, 0) for pair in zip(x.tolist(), y.tolist(), strict=True)]


def test_the_interval_holds_the_value_and_is_as_wide_as_theory_says():
    weak, strong = correlation(made_points(0)), correlation(made_points(3))
    assert weak.low < 0 < weak.high and strong.low > 0.8 and strong.low < strong.value < strong.high
    assert weak.high - weak.low == pytest.approx(2 * 1.96 / np.sqrt(59), rel=0.2)
    assert correlation(made_points(0)) == weak


def test_too_few_settings_are_refused():
    lost = losses(made_up())
    assert len(points(dict.fromkeys(lost, 1.0), lost)) == 42
    few = dict.fromkeys(list(lost)[:39], 1.0)
    with pytest.raises(ValueError, match="39 settings says little; at least 40"):
        points(few, lost)


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


def test_the_command_writes_points_and_a_plot(tmp_path, monkeypatch, capsys):
    weights = spectra.provenance("tiny", "test")["weights"]
    monkeypatch.setattr(spectra, "read", lambda path: made_up(weights=weights))
    made = {s: 0.2 + 0.01 * len(s.method) - s.keep / 5760 for s in losses(made_up())}
    monkeypatch.setattr(spectra, "distances", lambda *given: made)
    out, plot = tmp_path / "results" / "spectra.csv", tmp_path / "docs" / "spectra.png"
    spectra.main(["--pictures", "2", "--out", str(out), "--plot", str(plot), "--threads", "1"])
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 42 and {r["weights"] for r in rows} == {weights} and {r["pictures"] for r in rows} == {"2"}
    found = points(made, losses(made_up()))
    whole, within = correlation(found), correlation(found, within_keep=True)
    said = capsys.readouterr().out
    assert f"over 42 settings: {whole}; of methods at the same keep: {within}" in said
    assert 0 < whole.value < 1 and within.value == pytest.approx(0.75**0.5) and plot.stat().st_size > 10_000


@pytest.mark.parametrize(
    "rows, arguments, words",
    [
        (made_up(keeps=(144, 72)), [], "a rank correlation of 12 settings says little"),
        (made_up(weights="other"), [], "the accuracies are of weights other"),
        (made_up(), ["--pictures", "0"], "--pictures 0 is not possible; choose 1 to 210"),
    ],
)
def test_what_cannot_be_compared_is_refused(rows, arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(spectra, "read", lambda path: rows)
    monkeypatch.setattr(spectra, "distances", lambda *given: pytest.fail("measured before checking"))
    monkeypatch.setattr("pitome_mllm.commands.spectrum.check_matplotlib", lambda: None)
    with pytest.raises(SystemExit):
        spectra.main(arguments)
    assert words in " ".join(capsys.readouterr().err.split())
