"""Spectral distance against accuracy, on made-up results: correlating, telling, and what is refused."""

from itertools import product

import numpy as np
import pytest

from pitome_mllm import attach, load, spectral_distance
from pitome_mllm.families.features import pixel_values, tower_features
from pitome_mllm_eval.accuracy import spectra
from pitome_mllm_eval.accuracy.curves import Setting
from pitome_mllm_eval.accuracy.spectra import Point, correlation, correlations, ranks, spearman
from pitome_mllm_eval.benchmark.sets import scene
from pitome_mllm_eval.documents import write_csv

METHODS, KEEPS = ("tome", "pitome", "random"), (400, 288, 200, 144, 100, 72, 36)


def test_spearman_on_cases_worked_by_hand():
    x = np.array([1.0, 2, 3, 4, 5])
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0, 2.5, 1]
    assert spearman(x, x**3) == pytest.approx(1) and spearman(x, -x) == pytest.approx(-1)
    assert spearman(x, np.array([2.0, 1, 4, 3, 5])) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert np.isnan(spearman(x, np.ones(5)))
    keep = np.repeat([1.0, 2, 3], 4)
    x, y = 10 * keep + np.tile([1, 2, 3, 4], 3), 10 * keep + np.tile([4, 3, 2, 1], 3)
    assert spearman(x, y) > 0.7 and spearman(x, y, keep) == pytest.approx(-1)


def drawn(strength, count=60):
    """``x`` and ``y`` (count,): noise, and the more alike the greater the strength."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=count)
    return x, strength * x + rng.normal(size=count)


def width(found):
    return found[2] - found[1]


def test_the_interval_over_clusters_of_one_point_is_as_wide_as_theory_says():
    alone = [str(number) for number in range(60)]
    weak, strong = correlation(*drawn(0), alone), correlation(*drawn(3), alone)
    assert weak[1] < 0 < weak[2] and 0.8 < strong[1] < strong[0] < strong[2]
    assert width(weak) == pytest.approx(2 * 1.96 / np.sqrt(59), rel=0.2)


@pytest.mark.parametrize("within", [False, True])
def test_copies_of_points_in_their_clusters_do_not_narrow_the_interval(within):
    x, y = drawn(1)
    names, strata = np.repeat(list("abcdefghijklmno"), 4), np.tile([288, 144, 72, 36], 15)
    once = correlation(x, y, names, strata if within else None, draws=400)
    again = [np.concatenate([values] * 5) for values in (x, y, names, strata)]
    copied = correlation(*again[:3], again[3] if within else None, draws=400)
    assert copied == pytest.approx(once)
    unaware = correlation(*again[:2], [str(number) for number in range(300)], again[3] if within else None, draws=400)
    assert width(unaware) < 0.6 * width(once)


def row(method, published, keep, weights="0a"):
    """A row of a summary in which fewer tokens lose more, and random more than the others."""
    lost = {"tome": 0.02, "pitome": 0.03, "random": 0.1, "plain": 0}[method]
    figures = {"change": str(-lost * (1 - keep / 576)), "group_a": "", "split": "test", "weights": weights}
    return {"method": method, "published": str(published), "keep": str(keep), **figures}


def made_up(weights="0a", keeps=KEEPS):
    rows = [row(*name, weights) for name in product(METHODS, (True, False), keeps)]
    return [row("plain", False, 576, weights), *rows]


def test_distances_are_means_over_pictures_in_batches(monkeypatch):
    monkeypatch.setattr(spectra, "BATCH", 2)
    model, processor = load("tiny")
    pixels = pixel_values(processor, [scene(number)[0] for number in range(3)])
    setting = Setting("tome", True, 72)
    found = spectra.distances(model, pixels, [setting, Setting("dct", True, 144)])
    plain = tower_features(model, pixels)
    with attach(model, "tome", published=True, keep=72) as handle:
        tower_features(model, pixels)
        expected = spectral_distance(plain, handle.stats.merges).mean()
    assert found == {setting: pytest.approx(float(expected), abs=1e-6)}  # dct has no groups


def test_the_command_writes_points_of_which_plot_and_sentence_are_made(tmp_path, monkeypatch, capsys):
    rows = made_up(weights=spectra.provenance("tiny", "test")["weights"])
    write_csv(tmp_path / "accuracy.csv", rows)
    made = {s: 0.2 + 0.01 * len(s.method) - s.keep / 5760 for s in spectra.losses(rows)}
    monkeypatch.setattr(spectra, "distances", lambda *given: made)
    out = tmp_path / "spectra.csv"
    spectra.main(["--results", str(tmp_path / "accuracy.csv"), "--pictures", "2", "--out", str(out)])
    found, about = spectra.stored(out)
    said = capsys.readouterr().out.strip()
    assert len(found) == 42 and said == spectra.sentence(found, about)
    whole, within = correlations(found)
    assert "Over 42 settings of 6 methods, as published" in said and f"accuracy is {whole[0]:.2f} (" in said
    assert 0 < whole[0] < 1 and within[0] == pytest.approx(0.75**0.5, abs=0.05)
    spectra.plot(found, about, tmp_path / "spectra.png")
    assert (tmp_path / "spectra.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "rows, arguments, words",
    [
        (made_up(weights="other"), [], "the accuracies are of weights other"),
        (made_up(), ["--pictures", "0"], "--pictures 0 is not possible; choose 1 to 210"),
    ],
)
def test_what_cannot_be_compared_is_refused(rows, arguments, words, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(spectra, "provenance", lambda *given: {"weights": "0a"})
    monkeypatch.setattr(spectra, "distances", lambda *given: dict.fromkeys(spectra.losses(rows), 1.0))
    write_csv(tmp_path / "accuracy.csv", rows)
    with pytest.raises(SystemExit):
        spectra.main(["--results", str(tmp_path / "accuracy.csv"), "--out", str(tmp_path / "none.csv"), *arguments])
    assert words in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "none.csv").exists()


def test_one_method_has_no_interval():
    with pytest.raises(ValueError, match="at least 2 of them, got 1"):
        correlations([Point("tome", True, keep, keep, keep) for keep in range(40)])
