"""The spectral distance: zero where it must be, the lemma behind its shortcut, and the paper's theorem."""

import numpy as np
import pytest
import torch
from models import build, picture, processor

from pitome_mllm import attach, get_method, spectral_distance
from pitome_mllm.methods import METHODS, Merge
from pitome_mllm.spectral import TokenGraph, laplacian_spectrum


def tokens(batch=2, count=24, width=8, seed=0):
    return torch.randn(batch, count, width, generator=torch.Generator().manual_seed(seed))


def merged(metric, method="pitome", r=8, **options):
    return get_method(method).match(metric, r, **options)


def by_definition(metric, group):
    """SD of one row straight from the definition, token by token, in numpy."""
    x = np.asarray(metric, dtype=float)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    weights = 1 - x @ x.T
    np.fill_diagonal(weights, 0)
    group = np.asarray(group)
    lifted = np.zeros_like(weights)
    for i, a in enumerate(group):
        for j, b in enumerate(group):
            if a >= 0 and b >= 0:
                block = weights[np.ix_(group == a, group == b)]
                lifted[i, j] = block.sum() / block.size

    def spectrum(w):
        degree = w.sum(1)
        scale = np.where(degree > 0, np.maximum(degree, 1e-300) ** -0.5, 0)
        return np.linalg.eigvalsh(np.eye(len(w)) - scale[:, None] * w * scale)

    return np.abs(spectrum(weights) - spectrum(lifted)).sum()


@pytest.mark.parametrize("method", ["pitome", "tome", "random"])
def test_it_is_the_paper_s_definition(method):
    metric = tokens()
    merge = merged(metric, method)
    expected = [by_definition(metric[row], merge.group[row]) for row in range(2)]
    assert spectral_distance(metric, merge).tolist() == pytest.approx(expected, rel=1e-9)
    assert min(expected) > 0.1


@pytest.mark.parametrize("method", ["pitome", "tome", "random"])
def test_the_lemma_the_lifted_spectrum_is_the_coarse_one_and_ones(method):
    metric = tokens()
    merge, graph = merged(metric, method), TokenGraph(metric)
    member = (merge.group[..., None] == torch.arange(merge.count)).double()
    share = member / member.sum(1, keepdim=True)
    lifted = laplacian_spectrum(share @ graph.coarse(merge) @ share.mT)
    coarse = laplacian_spectrum(graph.coarse(merge))
    whole = torch.cat([coarse, torch.ones(2, 24 - merge.count)], 1).sort(1).values
    torch.testing.assert_close(lifted, whole, atol=1e-12, rtol=0)


def test_nothing_merged_is_zero():
    metric = tokens()
    assert spectral_distance(metric, merged(metric, r=0)).abs().max() < 1e-12
    assert spectral_distance(metric, []).abs().max() < 1e-12


def test_merging_identical_tokens_is_zero_and_others_is_not():
    metric = tokens().repeat_interleave(2, 1)
    metric[:, 1::2] *= 3.0  # of the same direction
    pairs = Merge(torch.arange(48).div(2, rounding_mode="floor").mul(2).repeat(2, 1), 24)
    assert spectral_distance(metric, pairs).abs().max() < 1e-9
    shifted = Merge(torch.arange(48).remainder(24).repeat(2, 1), 24)
    assert spectral_distance(metric, shifted).min() > 0.1


def test_only_tokens_alike_means_zero_by_definition():
    metric = tokens(2, 12, 7)
    metric[0] = metric[0, 0] * torch.arange(1, 13)[:, None].sqrt()  # of one direction, up to rounding
    merge = merged(metric, r=4)
    distance = spectral_distance(metric, merge)
    assert distance[0] == 0 and distance[1] > 0.01


def test_a_zero_token_is_far_from_every_other():
    metric = tokens(1, 6)
    metric[0, 2:4] = 0
    weights = TokenGraph(metric).weights[0]
    assert weights[2, 3] == 1 and weights[2, 2] == 0 and weights[2, 0] == 1


def test_a_dropped_token_keeps_its_place_without_edges():
    metric = tokens(1)
    merge = merged(metric, "random", r=5)
    kept = (merge.group[0] >= 0).nonzero().flatten()
    own = TokenGraph(metric[:, kept]).spectrum  # the graph of the survivors
    expected = torch.cat([own, torch.ones(1, 5)], 1).sort(1).values
    expected = float((TokenGraph(metric).spectrum - expected).abs().sum())
    assert spectral_distance(metric, merge).item() == pytest.approx(expected)


def test_rows_do_not_see_each_other():
    metric = tokens(3)
    whole = spectral_distance(metric, merged(metric, "tome"))
    alone = [spectral_distance(metric[i : i + 1], merged(metric[i : i + 1], "tome")) for i in range(3)]
    torch.testing.assert_close(whole, torch.cat(alone), atol=1e-10, rtol=0)


def test_several_merges_are_composed():
    metric = tokens()
    first = merged(metric, "tome")
    second = merged(first.reduce(metric)[0], "tome", r=4)
    steps, composed = spectral_distance(metric, [first, second]), spectral_distance(metric, first.then(second))
    assert torch.equal(steps, composed) and steps.min() > spectral_distance(metric, first).min()


def test_it_computes_in_float64_and_leaves_the_metric():
    metric = tokens().half()
    before = metric.clone()
    assert spectral_distance(metric, merged(metric)).dtype == torch.float64 and torch.equal(metric, before)


def test_of_a_run():
    model = build(layers=4)
    inputs = processor()(images=[picture(0), picture(1)], text=["<image> what"] * 2, return_tensors="pt")
    plain = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    with attach(model, "pitome", keep=144) as handle:
        model(**inputs)
    distance = spectral_distance(plain, handle.stats.merges)
    assert distance.shape == (2,) and distance.min() > 0


SIZES = (16, 12, 8, 6)  # of the planted clusters: different, as the paper's energy tells them apart by size
ALONE = 22


SWEEP = (0.3, 0.1, 0.03, 0.01, 0.001, 0.0001)


def planted(noise, seed, uneven=True):
    """Tokens (1, 64, 64): clusters around orthogonal directions, the others alone.

    ``uneven``: of the 42 clustered tokens 16 lie at even positions and 26 at odd ones, at random there: ToMe, whose
    split knows only positions, can then pair but 16 of them within clusters, while r = 21. Otherwise all lie in random
    order.
    """
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.normal(size=(64, 64)))[0][: len(SIZES) + ALONE]
    member = rng.permutation(np.repeat(np.arange(len(SIZES)), SIZES))
    even, odd = rng.permutation(np.arange(0, 64, 2)), rng.permutation(np.arange(1, 64, 2))
    where = np.concatenate([even[:16], odd[:26]]) if uneven else rng.permutation(64)[:42]
    label = np.full(64, -1)
    label[where] = member
    label[label < 0] = len(SIZES) + np.arange(ALONE)
    x = directions[label] + noise * rng.normal(size=(64, 64)) / 8
    return torch.tensor(x, dtype=torch.float32)[None], label


def distances(method, uneven, **options):
    """(noises, seeds) spectral distances over the sweep."""
    reducer = get_method(method, **options)
    tokens = [[planted(noise, seed, uneven)[0] for seed in range(10)] for noise in SWEEP]
    return np.array([[float(spectral_distance(x, reducer.match(x, 21))) for x in row] for row in tokens])


@pytest.mark.parametrize("uneven", [True, False])
def test_the_theorem_planted_clusters(uneven):
    """PiToMe's distance vanishes with the noise in every seed."""
    pitome = distances("pitome", uneven)
    assert (np.diff(pitome, axis=0) < 0).all() and pitome[-1].max() < 1e-7


@pytest.mark.parametrize("method, floor", [("tome", 0.05), ("random", 0.15)])
def test_others_stay_above_where_clusters_lie_unevenly_over_the_split(method, floor):
    assert distances(method, uneven=True).min() > floor


@pytest.mark.parametrize("method, floor", [("tome", 0.01), ("random", 0.2)])
def test_others_stay_above_on_average_in_random_order(method, floor):
    assert distances(method, uneven=False).mean(1).min() > floor


def pairs_over_the_split(label):
    """How many tokens at even positions have one of their cluster at an odd one: all that ToMe can merge inside."""
    even, odd = label[::2], label[1::2]
    return int(np.isin(even, odd).sum())


def test_tome_fails_just_where_its_split_leaves_too_few_pairs():
    enough = np.array([pairs_over_the_split(planted(0.0001, seed, uneven=False)[1]) >= 21 for seed in range(10)])
    found = distances("tome", uneven=False)[-1]
    assert 0 < enough.sum() < 10 and found[enough].max() < 1e-7 and found[~enough].min() > 0.01


@pytest.mark.parametrize("uneven", [True, False])
@pytest.mark.parametrize("method", ["pitome", "pitome-bsm", "mctf", "crossget"])
def test_the_condition_does_not_tell_pitome_from_other_rules_that_look_at_all_tokens(method, uneven):
    assert distances(method, uneven, **METHODS[method].library)[-1].max() < 1e-7


@pytest.mark.parametrize("uneven", [True, False])
def test_in_the_theorem_s_case_pitome_merges_inside_clusters_only(uneven):
    for seed in range(10):
        metric, label = planted(0.01, seed, uneven)
        group = merged(metric, r=21).group[0].numpy()
        assert all(len(set(label[group == g])) == 1 for g in range(43))


class NoGroups(Merge):
    def __init__(self):
        self.group, self.count, self.energy = None, 3, None


BAD = [
    (torch.ones(3, 4), merged(tokens()), r"metric is \(3, 4\); pass a tensor \(batch, tokens, channels\)"),
    ([1.0], merged(tokens()), "metric is list"),
    (torch.ones(1, 0, 4), [], r"at least one token"),
    (torch.full((1, 4, 4), torch.nan), [], "NaN or infinity"),
    (torch.ones(1, 4, 4) / 0, [], "NaN or infinity"),
    (tokens(), NoGroups(), "forms no groups"),
    (tokens(2, 25), merged(tokens()), r"merge is of \(2, 24\) \(rows, tokens\), the metric of \(2, 25\).*class token"),
    (tokens(3), merged(tokens()), r"\(2, 24\).*\(3, 24\)"),
]


@pytest.mark.parametrize("metric, merge, words", BAD, ids=range(len(BAD)))
def test_bad_input_says_what_is_wrong(metric, merge, words):
    with pytest.raises(ValueError, match=words):
        spectral_distance(metric, merge)
