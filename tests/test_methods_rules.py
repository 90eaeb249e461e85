"""Every other method against the rule of its paper, written out slowly.

The slow versions work in float64 on one row at a time with Python loops and sorts, follow the methods' docstrings, and
share no code with the package. `test_methods_golden.py` does the same for PiToMe and ToMe.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from drawn import SEEING, each, members
from torch import Tensor

from pitome_mllm.methods import METHODS, Merge, get_method

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}

NUMBERS = (1, 2, 5, 12, 27)
HALVING = [
    (n, r, protected) for n in NUMBERS for protected in (0, 1) for r in sorted({0, 1, n // 4, n // 2}) if r <= n // 2
]
ANY = [
    (n, r, protected)
    for n in NUMBERS
    for protected in (0, 1)
    for r in sorted({0, 1, n // 3, n // 2 + 1, n - 1})
    if r < n
]
SMALL = [shape for shape in ANY if shape[0] <= 12]
AMPLE = [shape for shape in ANY if shape[0] >= 12]

ATTENDING = [name for name in METHODS if "attention" in METHODS[name].reducer.needs]
SELECTING = ("divprune", "dart", "cdpruner", "random", "uniform")
seeds = pytest.mark.parametrize("seed", range(2))

# A slow method answers which tokens joined each kept one; what is dropped occurs nowhere.
Groups = dict[int, list[int]]


def draw(n: int, protected: int, seed: int, channels: int = 8) -> SimpleNamespace:
    """Two rows of ``n`` tokens and the protected ones before them, which would be first by attention and by length."""
    random = torch.Generator().manual_seed(1000 * seed + 10 * n + protected)
    tokens = n + protected
    metric = torch.randn(2, tokens, channels, generator=random)
    metric[:, :protected] *= 10
    attention = torch.rand(2, tokens, generator=random) + 0.01
    attention[:, :protected] = 9.0
    return SimpleNamespace(
        metric=metric,
        attention=attention,
        x=torch.randn(2, tokens, 5, generator=random),
        size=torch.randint(1, 6, (2, tokens, 1), generator=random).float(),
        query=torch.randn(2, channels, generator=random),
    )


def one_row(drawn: SimpleNamespace, row: int, given: tuple[str, ...]) -> SimpleNamespace:
    """One row as Python floats. What a method is not given counts the same for all tokens."""
    ones = [1.0] * drawn.x.shape[1]
    return SimpleNamespace(
        metric=drawn.metric[row].tolist(),
        x=drawn.x[row].tolist(),
        size=drawn.size[row, :, 0].tolist() if "size" in given else ones,
        attention=drawn.attention[row].tolist() if "attention" in given else ones,
        query=drawn.query[row].tolist() if "query" in given else None,
    )


def check(
    name: str,
    slow: Callable[..., Groups],
    shapes: list[tuple[int, int, int]],
    seed: int,
    *,
    value: Callable[..., list[float]] | None = None,
    given: tuple[str, ...] = ("size",),
    channels: int = 8,
    **options: object,
) -> None:
    """The method ``name`` forms the groups that ``slow`` forms, and their values, sizes and order are right."""
    for n, r, protected in shapes:
        drawn = draw(n, protected, seed, channels)
        inputs = {key: getattr(drawn, key) for key in given}
        merge = get_method(name, **options).match(drawn.metric, r, protected=protected, **inputs)
        features, sizes = merge.reduce(drawn.x, inputs.get("size"))
        for row in range(2):
            one = one_row(drawn, row, given)
            groups = slow(one, r, protected, **options)
            assert len(groups) == n + protected - r, "the slow version is wrong"
            compare(merge, row, groups, where=f"n={n} r={r} protected={protected} row={row}")
            in_order = sorted(groups, key=lambda kept: min([kept, *groups[kept]]))
            expected = torch.tensor([(value or size_weighted)(one, kept, groups[kept]) for kept in in_order])
            torch.testing.assert_close(features[row], expected, **TOLERANCE)
            assert sizes[row, :, 0].tolist() == [sum(one.size[i] for i in [k, *groups[k]]) for k in in_order]


def compare(merge: Merge, row: int, groups: Groups, where: str) -> None:
    """The same groups, numbered in reading order."""
    assert members(merge, row) == sorted(sorted([kept, *joined]) for kept, joined in groups.items()), where


# Pieces that several rules share.


def cosines(metric: list[list[float]]) -> list[list[float]]:
    """Similarity of every two tokens, the same in both directions to the bit, and of each to itself exactly one."""
    unit = [[value / math.hypot(*token) for value in token] for token in metric]
    similarity = [[sum(a * b for a, b in zip(one, other, strict=True)) for other in unit] for one in unit]
    for i, values in enumerate(similarity):
        values[i] = 1.0
    return similarity


def joined(tokens: int, target: dict[int, int]) -> Groups:
    """The groups after each key of ``target`` joined its value; all other tokens stay."""
    groups: Groups = {i: [] for i in range(tokens) if i not in target}
    for source, goal in target.items():
        groups[goal].append(source)
    return groups


def selected(protected: int, kept: list[int]) -> Groups:
    return {i: [] for i in [*range(protected), *kept]}


def by_attention(one: SimpleNamespace, protected: int) -> list[int]:
    """Unprotected tokens, those that the class token looks at most first."""
    return sorted(range(protected, len(one.metric)), key=lambda i: -one.attention[i])


def at_equal_distances(tokens: list[int], count: int) -> list[int]:
    return [tokens[number * len(tokens) // count] for number in range(count)]


def weighted(one: SimpleNamespace, group: list[int], weight: list[float]) -> list[float]:
    """Mean of the features of ``group``."""
    total = sum(weight[i] for i in group)
    return [sum(weight[i] * one.x[i][channel] for i in group) / total for channel in range(len(one.x[0]))]


def size_weighted(one: SimpleNamespace, kept: int, others: list[int]) -> list[float]:
    return weighted(one, [kept, *others], one.size)


def attention_weighted(one: SimpleNamespace, kept: int, others: list[int]) -> list[float]:
    return weighted(one, [kept, *others], one.attention)


# ToFu.


def slow_tofu(one: SimpleNamespace, r: int, protected: int, **_: object) -> Groups:
    """ToMe: even places are A and odd ones B, counted from the class token; the r best pairs of A and B merge."""
    cos, tokens = cosines(one.metric), range(len(one.metric))
    a, b = ([i for i in tokens if i % 2 == odd and i >= protected] for odd in (0, 1))
    best = {i: max(b, key=lambda j: cos[i][j]) for i in a} if r else {}
    chosen = sorted(best, key=lambda i: -cos[i][best[i]])[:r]
    return joined(len(tokens), {i: best[i] for i in chosen})


def of_largest_norm(one: SimpleNamespace, kept: int, others: list[int]) -> list[float]:
    """The mean, as long as the longest token of its group."""
    mean = size_weighted(one, kept, others)
    longest = max(math.hypot(*one.x[i]) for i in [kept, *others])
    return [v * longest / math.hypot(*mean) for v in mean]


@seeds
@pytest.mark.parametrize("given", [(), ("size",)])
def test_tofu(given, seed):
    """Without sizes, as the preset merges, the mean is the paper's plain one."""
    check("tofu", slow_tofu, HALVING, seed, value=of_largest_norm, given=given, reference="mean")


def test_tofu_is_the_papers_unless_told_otherwise():
    assert get_method("tofu") == get_method("tofu", reference="mean")


# MCTF.


def slow_mctf(
    one: SimpleNamespace,
    r: int,
    protected: int,
    tau_sim: float = 1.0,
    tau_info: float = 20.0,
    tau_size: float = 40.0,
    bidirectional: bool = True,
) -> Groups:
    cos, tokens = cosines(one.metric), range(len(one.metric))
    a, b = ([i for i in tokens if i % 2 == odd and i >= protected] for odd in (0, 1))

    def attraction(i: int, j: int) -> float:
        alike = ((cos[i][j] + 1) / 2) ** (1 / tau_sim)
        unseen = (1 / (one.attention[i] * one.attention[j])) ** (1 / tau_info)
        small = (1 / (one.size[i] * one.size[j])) ** (1 / tau_size)
        return alike * unseen * small

    def strongest(sources: list[int], targets: list[int], count: int) -> dict[int, int]:
        partner = {i: max(targets, key=lambda j: attraction(i, j)) for i in sources} if count else {}
        return {i: partner[i] for i in sorted(partner, key=lambda i: -attraction(i, partner[i]))[:count]}

    half = r // 2 if bidirectional else r
    there = strongest(a, b, half)
    back = strongest(b, [i for i in a if i not in there], r - half)
    # Whoever joined a token of B that then moved on is in the group that it moved to.
    return joined(len(tokens), {i: back.get(j, j) for i, j in there.items()} | back)


@seeds
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("given", [(), ("size",), ("attention",), ("size", "attention")])
@pytest.mark.parametrize("taus", [(1.0, 20.0, 40.0), (1.0, 2.0, 3.0), (4.0, 3.0, 2.0)])
def test_mctf(taus, given, bidirectional, seed):
    options = dict(zip(("tau_sim", "tau_info", "tau_size"), taus, strict=True), bidirectional=bidirectional)
    check("mctf", slow_mctf, HALVING, seed, given=given, **options)


@seeds
def test_mctf_counts_as_the_paper_unless_told_otherwise(seed):
    check("mctf", slow_mctf, HALVING, seed, given=("size", "attention"))


# CrossGET.


def slow_crossget(one: SimpleNamespace, r: int, protected: int) -> Groups:
    cos, others = cosines(one.metric), range(protected, len(one.metric))
    best = {i: max((cos[i][j] for j in others if j != i), default=-1.0) for i in others}
    order = sorted(others, key=lambda i: -best[i])
    ahead = {i: max((cos[i][j] for j in order[place + 1 :]), default=-2.0) for place, i in enumerate(order)}
    sources = sorted(others, key=lambda i: -ahead[i])[:r]
    rest = [j for j in others if j not in sources]
    return joined(len(one.metric), {i: max(rest, key=lambda j: cos[i][j]) for i in sources})


@seeds
@pytest.mark.parametrize("given", [(), ("size",)])
def test_crossget(given, seed):
    check("crossget", slow_crossget, ANY, seed, given=given)


# DiffRate.


def slow_diffrate(one: SimpleNamespace, r: int, protected: int) -> Groups:
    cos, order = cosines(one.metric), by_attention(one, protected)
    kept = order[: len(order) - r]
    return joined(len(one.metric), {i: max(kept, key=lambda j: cos[i][j]) for i in order if i not in kept})


@seeds
@pytest.mark.parametrize("given", [("attention",), ("size", "attention")])
def test_diffrate(given, seed):
    check("diffrate", slow_diffrate, ANY, seed, given=given)


# DCT.


def slow_dct(signal: list[float], count: int) -> list[float]:
    """One channel, cut after ``count`` coefficients of its orthonormal DCT-II and brought back at that length."""

    def factor(frequency: int, length: int) -> float:
        return math.sqrt((2 if frequency else 1) / length)

    def wave(frequency: int, place: int, length: int) -> float:
        return math.cos(math.pi * (2 * place + 1) * frequency / (2 * length))

    n = len(signal)
    spectrum = [factor(f, n) * sum(v * wave(f, i, n) for i, v in enumerate(signal)) for f in range(count)]
    inverse = [sum(factor(f, count) * y * wave(f, i, count) for f, y in enumerate(spectrum)) for i in range(count)]
    return [v * math.sqrt(count / n) for v in inverse]


@seeds
def test_dct(seed):
    for n, r, protected in ANY:
        drawn = draw(n, protected, seed)
        features, _ = get_method("dct").match(drawn.metric, r, protected=protected).reduce(drawn.x)
        assert torch.equal(features[:, :protected], drawn.x[:, :protected])
        for row in range(2):
            slow = [slow_dct(channel, n - r) for channel in drawn.x[row, protected:].T.tolist()]
            torch.testing.assert_close(features[row, protected:], torch.tensor(slow).T, **TOLERANCE)


def test_dct_gives_every_token_the_same_share_of_the_patches():
    for n, r, protected in ANY:
        drawn = draw(n, protected, seed=0)
        _, sizes = get_method("dct").match(drawn.metric, r, protected=protected).reduce(drawn.x, drawn.size)
        assert torch.equal(sizes[:, :protected], drawn.size[:, :protected])
        torch.testing.assert_close(sizes.sum(1), drawn.size.sum(1))
        if r:
            share = drawn.size[:, protected:].sum(1, keepdim=True) / (n - r)
            torch.testing.assert_close(sizes[:, protected:], share.expand(-1, n - r, -1))


def test_dct_leaves_a_constant_as_it_is():
    for n, r, protected in ANY:
        constant = torch.tensor([2.5, -1.0, 0.0]).expand(2, n + protected, 3)
        merge = get_method("dct").match(constant, r, protected=protected)
        torch.testing.assert_close(merge.reduce(constant)[0], constant[:, r:], **TOLERANCE)
        torch.testing.assert_close(merge.expand(constant[:, r:]), constant, **TOLERANCE)


def low_frequencies(n: int, count: int, seed: int) -> Tensor:
    """(2, n, 5): a random mixture of the first ``count`` cosines over ``n`` places."""
    place, frequency = torch.arange(n).double(), torch.arange(count).double()
    waves = torch.cos(math.pi * (place[:, None] + 0.5) * frequency / n)
    mixture = torch.randn(2, count, 5, generator=torch.Generator().manual_seed(seed))
    return (waves @ mixture.double()).float()


def test_dct_keeps_low_frequencies_and_forgets_the_others():
    for seed, (n, r, protected) in enumerate(ANY):
        merge = get_method("dct").match(torch.zeros(2, n + protected, 1), r, protected=protected)
        front = torch.full((2, protected, 5), 7.0)
        low = torch.cat([front, low_frequencies(n, n - r, seed)], 1)
        torch.testing.assert_close(merge.expand(merge.reduce(low)[0]), low, **TOLERANCE)
        if r:  # the next frequency is orthogonal to all that is kept
            wave = torch.cos(math.pi * (torch.arange(n) + 0.5) * (n - r) / n)[None, :, None].expand(2, -1, 5)
            gone = merge.reduce(torch.cat([front, wave], 1))[0][:, protected:]
            torch.testing.assert_close(gone, torch.zeros_like(gone), **TOLERANCE)


# VisionZip.


def slow_visionzip(one: SimpleNamespace, r: int, protected: int, dominant: float = 54 / 64) -> Groups:
    cos, order = cosines(one.metric), by_attention(one, protected)
    keep = len(order) - r
    count = min(round(dominant * keep), keep - 1)  # at least one target
    rest = sorted(order[count:])
    targets = at_equal_distances(rest, keep - count)
    return joined(len(one.metric), {i: max(targets, key=lambda j: cos[i][j]) for i in rest if i not in targets})


def target_plus_mean(one: SimpleNamespace, kept: int, others: list[int]) -> list[float]:
    """The target is whole, whatever the sizes, and stays itself where nobody joined it."""
    if not others:
        return one.x[kept]
    added = weighted(one, others, [1.0] * len(one.x))
    return [a + b for a, b in zip(one.x[kept], added, strict=True)]


@seeds
@pytest.mark.parametrize("dominant", [54 / 64, 0.5, 0.0, 1.0])
def test_visionzip(dominant, seed):
    given = ("size", "attention")
    check("visionzip", slow_visionzip, ANY, seed, value=target_plus_mean, given=given, dominant=dominant)


@seeds
def test_visionzip_without_sizes(seed):
    check("visionzip", slow_visionzip, ANY, seed, value=target_plus_mean, given=("attention",))


@pytest.mark.parametrize("protected", [0, 1])
def test_visionzip_to_one_token_is_the_first_plus_the_mean_of_the_others(protected):
    drawn = draw(12, protected, seed=0)
    merge = get_method("visionzip").match(drawn.metric, 11, protected=protected, attention=drawn.attention)
    patches = drawn.x[:, protected:].double()
    expected = patches[:, 0] + patches[:, 1:].mean(1)
    torch.testing.assert_close(merge.reduce(drawn.x)[0][:, protected], expected.float(), **TOLERANCE)


def test_visionzip_keeps_54_dominant_tokens_of_64():
    """The paper's split: no more than 10 tokens are joined by others, and the 54 that attention favours stay alone."""
    drawn = draw(576, 1, seed=0)
    merge = get_method("visionzip").match(drawn.metric, 512, protected=1, attention=drawn.attention)
    for row, attention in enumerate(drawn.attention):
        alone = {group[0] for group in members(merge, row)[1:] if len(group) == 1}
        dominant = set((attention[1:].argsort(descending=True)[:54] + 1).tolist())
        assert dominant <= alone and len(members(merge, row)) == 65
        lengths = sorted(len(group) for group in members(merge, row)[1:])
        assert lengths[-10] > 1 and sum(lengths[-10:]) == 576 - 54


# PruMerge.


def slow_prumerge(one: SimpleNamespace, r: int, protected: int, uniform: float = 0.0) -> Groups:
    cos, order = cosines(one.metric), by_attention(one, protected)
    keep = len(order) - r
    count = round(uniform * keep)
    kept = order[: keep - count]
    left = sorted(order[keep - count :])
    kept = kept + (at_equal_distances(left, count) if count else [])
    return joined(len(one.metric), {i: max(kept, key=lambda j: cos[i][j]) for i in left if i not in kept})


def slow_prumerge_plus(one: SimpleNamespace, r: int, protected: int) -> Groups:
    return slow_prumerge(one, r, protected, uniform=0.5)


@seeds
@pytest.mark.parametrize("name, slow", [("prumerge", slow_prumerge), ("prumerge-plus", slow_prumerge_plus)])
@pytest.mark.parametrize("given", [("attention",), ("size", "attention")])
def test_prumerge(name, slow, given, seed):
    check(name, slow, ANY, seed, value=attention_weighted, given=given)


@seeds
@pytest.mark.parametrize("uniform", [0.25, 0.8, 1.0])
def test_prumerge_with_another_share_of_samples(uniform, seed):
    check("prumerge", slow_prumerge, ANY, seed, value=attention_weighted, given=("attention",), uniform=uniform)


# DivPrune.


def slow_divprune(one: SimpleNamespace, r: int, protected: int) -> Groups:
    cos, others = cosines(one.metric), range(protected, len(one.metric))
    kept: list[int] = []

    def distance(i: int) -> float:
        return min((1 - cos[i][j] for j in kept or others if j != i), default=0.0)

    while len(kept) < len(others) - r:
        kept.append(max((i for i in others if i not in kept), key=distance))
    return selected(protected, kept)


@seeds
def test_divprune(seed):
    check("divprune", slow_divprune, ANY, seed)


# DART.


def slow_dart(one: SimpleNamespace, r: int, protected: int, pivots: int = 8) -> Groups:
    cos, others = cosines(one.metric), range(protected, len(one.metric))
    keep = len(others) - r
    longest = sorted(others, key=lambda i: -sum(abs(v) for v in one.metric[i]))[: min(pivots, keep)]
    kept = list(longest)
    share, left_over = divmod(keep - len(longest), len(longest))
    for place, pivot in enumerate(longest):
        unlike = sorted((i for i in others if i not in kept), key=lambda i: cos[pivot][i])
        kept += unlike[: share + 1 if place < left_over else share]
    return selected(protected, kept)


@seeds
@pytest.mark.parametrize("pivots", [1, 3, 8, 40])
def test_dart(pivots, seed):
    check("dart", slow_dart, ANY, seed, pivots=pivots)


@seeds
def test_dart_has_eight_pivots_unless_told_otherwise(seed):
    check("dart", slow_dart, ANY, seed)


# CDPruner.


def relevance(one: SimpleNamespace, protected: int) -> list[float]:
    """Similarity of every unprotected token to the question, from 0 (least) to 1 (most similar)."""
    if one.query is None:
        return [1.0] * len(one.metric)
    similarity = cosines([one.query, *one.metric])[0][1:]
    low, high = min(similarity[protected:]), max(similarity[protected:])
    return [(value - low) / ((high - low) or 1.0) for value in similarity]


def slow_cdpruner(one: SimpleNamespace, r: int, protected: int) -> Groups:
    """Determinants from the definition; of equal ones the first token, as everywhere."""
    cos, q, others = cosines(one.metric), relevance(one, protected), range(protected, len(one.metric))
    kept: list[int] = []

    def volume(chosen: list[int]) -> float:
        if not chosen:
            return 1.0
        kernel = [[q[i] * cos[i][j] * q[j] for j in chosen] for i in chosen]
        return torch.linalg.det(torch.tensor(kernel, dtype=torch.float64)).item()

    while len(kept) < len(others) - r:
        open_to = [i for i in others if i not in kept]
        best = max(open_to, key=lambda i: volume([*kept, i]))
        if volume([*kept, best]) < 1e-9 * volume(kept):  # no gain is left: reading order
            return selected(protected, kept + open_to[: len(others) - r - len(kept)])
        kept.append(best)
    return selected(protected, kept)


@seeds
@pytest.mark.parametrize("given", [("size",), ("size", "query")])
def test_cdpruner(given, seed):
    check("cdpruner", slow_cdpruner, SMALL, seed, given=given, channels=16)


@seeds
@pytest.mark.parametrize("given", [("size",), ("size", "query")])
@pytest.mark.parametrize("channels", [2, 4])
def test_cdpruner_of_more_tokens_than_dimensions(channels, given, seed):
    check("cdpruner", slow_cdpruner, AMPLE, seed, given=given, channels=channels)


@pytest.mark.parametrize("protected", [0, 1])
def test_cdpruner_to_one_token(protected):
    """With a question the one most like it, and without one the first, since all gain the same."""
    for seed in range(20):
        drawn = draw(12, protected, seed)
        alike = torch.cosine_similarity(drawn.metric, drawn.query[:, None], dim=-1)[:, protected:].argmax(1)
        merge = get_method("cdpruner").match(drawn.metric, 11, protected=protected, query=drawn.query)
        assert [members(merge, row)[-1] for row in range(2)] == [[i + protected] for i in alike.tolist()]
        merge = get_method("cdpruner").match(drawn.metric, 11, protected=protected)
        assert [members(merge, row)[-1] for row in range(2)] == [[protected]] * 2, f"seed={seed}"


# The controls.


def slow_uniform(one: SimpleNamespace, r: int, protected: int) -> Groups:
    others = list(range(protected, len(one.metric)))
    return selected(protected, at_equal_distances(others, len(others) - r))


@seeds
def test_uniform(seed):
    check("uniform", slow_uniform, ANY, seed)


def test_uniform_keeps_the_first_token_and_equal_distances():
    for n in (*NUMBERS, 64, 576):
        for keep in sorted({1, 2, n // 3, n - 1, n} & set(range(1, n + 1))):
            merge = get_method("uniform").match(torch.ones(1, n + 1, 2), n - keep, protected=1)
            kept = [group[0] for group in members(merge, 0)[1:]]
            steps = [after - before for before, after in zip(kept, [*kept[1:], n + 1], strict=True)]
            assert kept[0] == 1 and len(kept) == keep and max(steps) - min(steps) <= 1


@pytest.mark.parametrize("grid", [(4, 4), (6, 6), (3, 5), (2, 12)])
@pytest.mark.parametrize("protected", [0, 1])
def test_downsample_has_the_groups_of_pool(grid, protected):
    height, width = grid
    metric = torch.ones(2, height * width + protected, 2)
    for keep in sorted({a * b for a in range(1, height + 1) for b in range(1, width + 1)}):
        options = {"protected": protected, "grid": grid}
        small, pooled = (
            get_method(name).match(metric, height * width - keep, **options) for name in ("downsample", "pool")
        )
        assert small.count == pooled.count == keep + protected and torch.equal(small.group, pooled.group)


@pytest.mark.parametrize("side", [4, 6, 12])
def test_downsample_makes_the_sides_as_equal_as_the_count_allows(side):
    for keep in get_method("downsample").allowed(side * side):
        merge = get_method("downsample").match(torch.ones(1, side * side, 2), side * side - keep)
        rows = {tuple(sorted({i // side for i in group})) for group in members(merge, 0)}
        columns = {tuple(sorted({i % side for i in group})) for group in members(merge, 0)}
        possible = [(a, keep // a) for a in range(1, side + 1) if keep % a == 0 and keep // a <= side]
        assert len(rows) * len(columns) == keep
        assert max(len(rows), len(columns)) == min(max(pair) for pair in possible)


def test_only_downsample_shrinks_the_picture():
    assert [name for name in METHODS if METHODS[name].reducer.shrinks_picture] == ["downsample"]


# What holds for several.


@each(ATTENDING)
@pytest.mark.parametrize("factor", [1e-3, 0.7, 40.0])
def test_a_common_factor_of_the_attention_changes_nothing(name, factor):
    """Attention may sum to one or not, and be of few tokens or of many."""
    for seed in range(4):
        drawn = draw(27, 1, seed)
        options = {"size": drawn.size, "protected": 1}
        merge, scaled, other = (
            get_method(name).match(drawn.metric, 11, attention=attention, **options)
            for attention in (drawn.attention, drawn.attention * factor, drawn.attention.reciprocal() ** 4)
        )
        assert torch.equal(merge.group, scaled.group)
        assert not torch.equal(merge.group, other.group), "attention must matter"
        torch.testing.assert_close(merge.reduce(drawn.x)[0], scaled.reduce(drawn.x)[0], **TOLERANCE)


def groups_of(name: str, drawn: SimpleNamespace, metric: Tensor, r: int, **more: Tensor) -> Tensor:
    inputs = {"attention": drawn.attention} if name in ATTENDING else {}
    return get_method(name).match(metric, r, size=drawn.size, protected=1, **inputs, **more).group


@each([name for name in SEEING if name != "dart"])
def test_the_length_of_a_metric_does_not_matter(name):
    """Cosine similarity: every token may be of another length."""
    for seed in range(4):
        drawn = draw(27, 1, seed, channels=32)
        random = torch.Generator().manual_seed(seed)
        length = 10 ** (2 * torch.rand(2, 28, 1, generator=random) - 1)
        plain, scaled = (groups_of(name, drawn, metric, 11) for metric in (drawn.metric, drawn.metric * length))
        assert torch.equal(plain, scaled), f"seed={seed}"


def test_the_length_of_the_question_does_not_matter():
    for seed in range(4):
        drawn = draw(27, 1, seed, channels=32)
        plain, scaled, none = (
            groups_of("cdpruner", drawn, drawn.metric, 11, query=query)
            for query in (drawn.query, drawn.query * 37, drawn.query.flip(-1))
        )
        assert torch.equal(plain, scaled) and not torch.equal(plain, none)


def test_dart_depends_on_lengths_but_not_on_a_common_factor():
    for seed in range(4):
        drawn = draw(27, 1, seed)
        plain = groups_of("dart", drawn, drawn.metric, 11)
        assert torch.equal(plain, groups_of("dart", drawn, drawn.metric * 37, 11))
        for row in range(2):
            longer = drawn.metric.clone()
            dropped = (plain[row] < 0).int().argmax()
            longer[row, dropped] *= 100
            assert groups_of("dart", drawn, longer, 11)[row, dropped] >= 0


@each(SELECTING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_selects_never_averages(name, dtype):
    for n, r, protected in ANY:
        drawn = draw(n, protected, seed=3)
        x = drawn.x.to(dtype)
        merge = get_method(name).match(drawn.metric, r, size=drawn.size, protected=protected)
        features, sizes = merge.reduce(x, drawn.size)
        spread = merge.expand(features)
        for row in range(2):
            groups = members(merge, row)
            assert [len(group) for group in groups] == [1] * (n + protected - r)
            kept = [group[0] for group in groups]
            assert torch.equal(features[row], x[row, kept]) and torch.equal(sizes[row], drawn.size[row, kept])
            dropped = [i for i in range(n + protected) if i not in kept]
            assert torch.equal(spread[row, kept], x[row, kept]) and not spread[row, dropped].any()
