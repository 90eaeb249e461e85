"""What holds for every entry of METHODS, whatever the tokens: exact counts, numbering, independence, precision.

A new method is tested here as soon as it has its row. What it cannot promise, it says in one of the sets below.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pitome_mllm.methods import METHODS, Merge, Reducer, get_method

BLIND = {"random", "pool"}  # decide without looking at the metric
RESCALING: set[str] = set()  # combine a group otherwise than by its size-weighted mean
GROUPLESS: set[str] = set()  # merge.group is None

NAMES = sorted(METHODS)
GROUPING = [name for name in NAMES if name not in GROUPLESS]
AVERAGING = [name for name in GROUPING if name not in RESCALING]
SEEING = [name for name in GROUPING if name not in BLIND]
FINITE = ("normal", "positive", "duplicates", "equal", "zero", "some zero", "one hot", "huge", "tiny")
FLAVOURS = (*FINITE, "nan", "all nan", "infinite")
TOKENS = (36, 25, 17, 16, 9, 7, 5, 4, 3, 2, 1)
ANY_SHARE = st.sampled_from((1.0, 0.75, 0.5, 0.3, 0.1, 0.0))

fast = settings(derandomize=True, deadline=None, max_examples=30, database=None)


def each(names: list[str]):
    return pytest.mark.parametrize("name", names)


def metric_of(flavour: str, batch: int, tokens: int, channels: int, random: torch.Generator) -> Tensor:
    """A metric (B, N, C) of one kind, normal or nasty."""
    normal = torch.randn(batch, tokens, channels, generator=random)
    some = torch.rand(batch, tokens, 1, generator=random) < 0.3
    made = {
        "normal": lambda: normal,
        "positive": lambda: normal.abs() + 0.5,
        "duplicates": lambda: normal[:, torch.randint(max(1, tokens // 3), (tokens,), generator=random)],
        "equal": lambda: normal[:, :1].expand_as(normal).clone(),
        "zero": lambda: torch.zeros_like(normal),
        "some zero": lambda: normal.masked_fill(some, 0.0),
        "one hot": lambda: torch.eye(channels)[torch.randint(channels, (batch, tokens), generator=random)],
        "huge": lambda: normal * 1e30,
        "tiny": lambda: normal * 1e-40,
        "all nan": lambda: torch.full_like(normal, math.nan),
        "nan": lambda: normal.masked_fill(some, math.nan),
        "infinite": lambda: normal.masked_fill(some, -math.inf),
    }
    return made[flavour]()


@dataclass
class Tokens:
    """One drawn input; ``share`` of what a method can remove is removed."""

    flavour: str
    batch: int
    patches: int
    protected: int
    channels: int
    share: float
    depth: float
    seed: int

    def make(self, reducer: Reducer) -> SimpleNamespace:
        """metric, x, size, r and the keywords of `match` for one reducer."""
        random = torch.Generator().manual_seed(self.seed)
        patches = math.isqrt(self.patches) ** 2 if "grid" in reducer.needs else self.patches
        n = patches + self.protected
        metric = metric_of(self.flavour, self.batch, n, self.channels, random)
        x = torch.randn(self.batch, n, 5, generator=random)
        size = torch.randint(1, 6, (self.batch, n, 1), generator=random).float()
        possible = removable(reducer, patches)
        r = possible[round(self.share * (len(possible) - 1))]
        options = {"size": size, "protected": self.protected, "depth": self.depth} | extras(
            reducer, self.batch, n, patches
        )
        return SimpleNamespace(metric=metric, x=x, size=size, r=r, n=n, patches=patches, options=options)


def extras(reducer: Reducer, batch: int, tokens: int, patches: int) -> dict[str, Any]:
    """What `match` requires beyond the metric, where the reducer says so."""
    random = torch.Generator().manual_seed(tokens)
    side = math.isqrt(patches)
    values = {
        "attention": torch.rand(batch, tokens, generator=random),
        "query": torch.randn(batch, 5, generator=random),
        "grid": (side, side),
    }
    return {key: values[key] for key in reducer.needs}


def removable(reducer: Reducer, patches: int) -> list[int]:
    """All r that one step can remove of ``patches`` unprotected tokens, ascending."""
    most = reducer.max_removable(patches)
    return sorted(patches - keep for keep in reducer.allowed(patches) if patches - keep <= most)


def tokens(flavours=FLAVOURS, batch=(1, 3), share=ANY_SHARE, patches=TOKENS):
    return st.builds(
        Tokens,
        flavour=st.sampled_from(flavours),
        batch=st.integers(*batch),
        patches=st.sampled_from(patches),
        protected=st.integers(0, 2),
        channels=st.integers(1, 6),
        share=share,
        depth=st.sampled_from((0.0, 0.3, 13 / 23, 22 / 23, 1.0)),
        seed=st.integers(0, 2**20),
    )


def of_row(value: Any, row: int) -> Any:
    return value[row : row + 1] if isinstance(value, Tensor) else value


def members(merge: Merge, row: int) -> list[list[int]]:
    """The token indices of every group of one row."""
    group = merge.group[row].tolist()
    return [[i for i, g in enumerate(group) if g == number] for number in range(merge.count)]


def mean_of_groups(merge: Merge, x: Tensor, size: Tensor) -> Tensor:
    """Size-weighted mean (B, K, C) of every group, in float64, from the groups alone."""
    weight = torch.nn.functional.one_hot(merge.group + 1, merge.count + 1)[..., 1:].double() * size.double()
    return weight.mT @ x.double() / weight.sum(1)[..., None]


# Counts, numbering, and what must not change.


@each(GROUPING)
@fast
@given(drawn=tokens())
def test_exactly_n_minus_r_groups_in_reading_order(name, drawn):
    reducer = get_method(name)
    t = drawn.make(reducer)
    merge = reducer.match(t.metric, t.r, **t.options)
    assert merge.count == t.n - t.r
    assert merge.group.shape == (drawn.batch, t.n) and merge.group.dtype == torch.int64
    for row in range(drawn.batch):
        first = [min(group) for group in members(merge, row)]  # min() of an empty group fails
        assert first == sorted(first)
        assert merge.group[row].min() >= -1 and merge.group[row].max() < merge.count


@each(NAMES)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_kind_of_tokens_in_every_number(name, flavour):
    """Drawn examples leave gaps; this walks through all combinations of kind, number, protection and share."""
    reducer = get_method(name)
    for patches, protected, share in itertools.product(TOKENS, (0, 1), (1.0, 0.5)):
        t = Tokens(flavour, 2, patches, protected, 4, share, 0.5, seed=patches).make(reducer)
        merge = reducer.match(t.metric, t.r, **t.options)
        features, sizes = merge.reduce(t.x, t.size)
        assert merge.count == t.n - t.r and features.shape == (2, merge.count, 5)
        assert features.isfinite().all() and (sizes > 0).all()
        if merge.group is not None:
            used = torch.nn.functional.one_hot(merge.group + 1, merge.count + 1)[..., 1:].sum(1)
            assert (used >= 1).all(), (patches, protected, share)


@each(NAMES)
@fast
@given(drawn=tokens())
def test_shapes_and_kinds_of_the_results(name, drawn):
    reducer = get_method(name)
    t = drawn.make(reducer)
    merge = reducer.match(t.metric, t.r, **t.options)
    features, sizes = merge.reduce(t.x, t.size)
    assert features.shape == (drawn.batch, t.n - t.r, 5) and features.dtype == t.x.dtype
    assert sizes.shape == (drawn.batch, t.n - t.r, 1) and sizes.dtype == torch.float32
    assert features.isfinite().all() and sizes.isfinite().all() and (sizes > 0).all()
    if merge.energy is not None:
        assert merge.energy.shape == (drawn.batch, t.patches) and merge.energy.dtype == torch.float32
        assert merge.energy.isfinite().all()


@each(NAMES)
@fast
@given(drawn=tokens())
def test_protected_tokens_stay_as_they_are(name, drawn):
    reducer = get_method(name)
    t = drawn.make(reducer)
    merge = reducer.match(t.metric, t.r, **t.options)
    features, sizes = merge.reduce(t.x, t.size)
    p = drawn.protected
    assert torch.equal(features[:, :p], t.x[:, :p]) and torch.equal(sizes[:, :p], t.size[:, :p])
    if merge.group is not None:
        assert (merge.group[:, :p] == torch.arange(p)).all()
        assert ((merge.group[:, p:] >= p) | (merge.group[:, p:] == -1)).all()


@each(GROUPING)
@fast
@given(drawn=tokens())
def test_sizes_are_conserved(name, drawn):
    """All of them where nothing is dropped, else all but those of the dropped tokens."""
    reducer = get_method(name)
    t = drawn.make(reducer)
    merge = reducer.match(t.metric, t.r, **t.options)
    _, sizes = merge.reduce(t.x, t.size)
    kept = t.size.masked_fill((merge.group < 0)[..., None], 0.0)
    assert torch.equal(sizes.sum(1), kept.sum(1))
    for row in range(drawn.batch):
        assert sizes[row, :, 0].tolist() == [t.size[row, group].sum().item() for group in members(merge, row)]


@each(AVERAGING)
@fast
@given(drawn=tokens())
def test_features_are_the_size_weighted_mean(name, drawn):
    reducer = get_method(name)
    t = drawn.make(reducer)
    merge = reducer.match(t.metric, t.r, **t.options)
    features, _ = merge.reduce(t.x, t.size)
    expected = mean_of_groups(merge, t.x, t.size)
    torch.testing.assert_close(features.double(), expected, rtol=1e-5, atol=1e-5)


@each(GROUPING)
@fast
@given(drawn=tokens())
def test_a_token_that_stays_alone_is_unchanged_to_the_bit(name, drawn):
    reducer = get_method(name)
    t = drawn.make(reducer)
    merge = reducer.match(t.metric, t.r, **t.options)
    features, _ = merge.reduce(t.x, t.size)
    for row in range(drawn.batch):
        alone = [(k, group[0]) for k, group in enumerate(members(merge, row)) if len(group) == 1]
        assert all(torch.equal(features[row, k], t.x[row, i]) for k, i in alone)


@each(NAMES)
@fast
@given(drawn=tokens(share=st.just(0.0)))
def test_removing_nothing_changes_nothing(name, drawn):
    reducer = get_method(name)
    t = drawn.make(reducer)
    merge = reducer.match(t.metric, 0, **t.options)
    features, sizes = merge.reduce(t.x, t.size)
    assert merge.count == t.n
    assert torch.equal(features, t.x) and torch.equal(sizes, t.size)
    if merge.group is not None:
        assert (merge.group == torch.arange(t.n)).all()


@each(NAMES)
def test_one_step_removes_at_most_what_the_method_says(name):
    reducer = get_method(name)
    for patches in range(1, 38):
        if "grid" in reducer.needs and math.isqrt(patches) ** 2 != patches:
            continue
        possible = removable(reducer, patches)
        assert possible[0] == 0 and possible[-1] <= reducer.max_removable(patches) < patches
        for protected in (0, 1):
            options = {"protected": protected} | extras(reducer, 2, patches + protected, patches)
            metric = torch.randn(2, patches + protected, 3, generator=torch.Generator().manual_seed(patches))
            assert reducer.match(metric, possible[-1], **options).count == patches + protected - possible[-1]


@each(NAMES)
@pytest.mark.parametrize("patches", [1, 2, 9, 16, 25])
def test_removing_more_than_possible_is_an_error_that_helps(name, patches):
    reducer = get_method(name)
    most = reducer.max_removable(patches)
    options = {"protected": 1} | extras(reducer, 2, patches + 1, patches)
    for r in (most + 1, patches + 5, -1):
        with pytest.raises(ValueError, match=str(r)) as caught:
            reducer.match(torch.ones(2, patches + 1, 3), r, **options)
        assert str(most) in str(caught.value) and str(patches) in str(caught.value)


@each(NAMES)
def test_every_count_it_allows_is_reached_in_steps(name):
    """`allowed` counts what repeated matching reaches; a method that reduces once reaches it in one step."""
    reducer = get_method(name)
    patches = 36
    for keep in reducer.allowed(patches):
        metric = torch.randn(1, patches, 4, generator=torch.Generator().manual_seed(keep))
        left = patches
        while left > keep:
            r = min(left - keep, reducer.max_removable(left))
            assert r > 0 and (not reducer.once or left == patches)
            merge = reducer.match(metric, r, **extras(reducer, 1, left, left))
            metric, _ = merge.reduce(metric)
            left = metric.shape[1]
        assert left == keep


# Determinism and independence.


@each(NAMES)
@fast
@given(drawn=tokens(batch=(2, 4)))
def test_rows_of_a_batch_are_independent(name, drawn):
    reducer = get_method(name)
    t = drawn.make(reducer)
    merge = reducer.match(t.metric, t.r, **t.options)
    features, sizes = merge.reduce(t.x, t.size)
    for row in range(drawn.batch):
        options = {key: of_row(value, row) for key, value in t.options.items()}
        alone = reducer.match(of_row(t.metric, row), t.r, **options)
        alone_features, alone_sizes = alone.reduce(of_row(t.x, row), of_row(t.size, row))
        if merge.group is not None:
            assert torch.equal(alone.group[0], merge.group[row])
        torch.testing.assert_close(alone_features[0], features[row])
        torch.testing.assert_close(alone_sizes[0], sizes[row])


@each(NAMES)
@fast
@given(drawn=tokens())
def test_the_same_call_gives_the_same_result_and_touches_nothing(name, drawn):
    reducer = get_method(name)
    t = drawn.make(reducer)
    given_metric, given_x, given_size = t.metric.clone(), t.x.clone(), t.size.clone()
    state = torch.random.get_rng_state()
    first = reducer.match(t.metric, t.r, **t.options)
    first_features, _ = first.reduce(t.x, t.size)
    assert torch.equal(state, torch.random.get_rng_state()), "a method must not draw from the global generator"
    torch.rand(3)
    second = get_method(name).match(t.metric, t.r, **t.options)
    if first.group is not None:
        assert torch.equal(first.group, second.group)
    assert torch.equal(first_features, second.reduce(t.x, t.size)[0])
    assert torch.equal(given_x, t.x) and torch.equal(given_size, t.size)
    assert torch.equal(given_metric.nan_to_num(1.5), t.metric.nan_to_num(1.5))


@each(NAMES)
@fast
@given(drawn=tokens(flavours=FINITE))
def test_memory_layout_does_not_matter(name, drawn):
    reducer = get_method(name)
    t = drawn.make(reducer)
    merge = reducer.match(t.metric, t.r, **t.options)
    strided = [value.mT.contiguous().mT for value in (t.metric, t.x, t.size)]
    other = reducer.match(strided[0], t.r, **t.options)
    torch.testing.assert_close(other.reduce(*strided[1:])[0], merge.reduce(t.x, t.size)[0])


@each(["pitome", "pitome-tuned", "pitome-bsm", "pitome-llava", "tome"])
@pytest.mark.parametrize("depth", [0.0, 22 / 23])
@pytest.mark.parametrize("protected", [0, 1])
def test_among_equals_the_first_merge(name, protected, depth):
    """Stable sorts: of tokens that are all alike, the first 2r are the ones that merge."""
    metric = torch.tensor([1.0, 0.0, 0.0]).expand(2, 24 + protected, 3)
    merge = get_method(name).match(metric, 5, protected=protected, depth=depth)
    for row in range(2):
        merged = [i for group in members(merge, row) if len(group) > 1 for i in group]
        assert max(merged) < protected + 10


# Precision.


@each(NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@fast
@given(drawn=tokens(flavours=("normal", "positive", "duplicates", "equal", "zero", "one hot")))
def test_low_precision_input_is_handled_in_float32(name, dtype, drawn):
    """Half precision in gives what the same numbers in float32 give, rounded once at the end."""
    reducer = get_method(name)
    t = drawn.make(reducer)
    metric, x = t.metric.to(dtype), t.x.to(dtype)
    merge, reference = (reducer.match(value, t.r, **t.options) for value in (metric, metric.float()))
    features, sizes = merge.reduce(x, t.size)
    expected, expected_sizes = reference.reduce(x.float(), t.size)
    if merge.group is not None:
        assert torch.equal(merge.group, reference.group)
    assert features.dtype == dtype and sizes.dtype == torch.float32
    assert torch.equal(features, expected.to(dtype)) and torch.equal(sizes, expected_sizes)


@each(AVERAGING)
@pytest.mark.parametrize("dtype, value", [(torch.float16, 60000.0), (torch.bfloat16, 1.0078125)])
def test_large_groups_neither_overflow_nor_stall(name, dtype, value):
    """Summed in float16, 288 times 60000 is infinite; summed in bfloat16, 1 + 1 + ... stays at 256."""
    reducer = get_method(name)
    x = torch.full((1, 576, 2), value, dtype=dtype)
    keep = 1 if reducer.once else 576 - min(288, reducer.max_removable(576))
    merge = reducer.match(torch.ones_like(x), 576 - keep, **extras(reducer, 1, 576, 576))
    features, sizes = merge.reduce(x, torch.ones(1, 576, 1))
    assert torch.equal(features, x[:, :keep])
    assert sizes.max() > 256 or name == "random"


@each(SEEING)
@pytest.mark.parametrize("scale", [2.0**13, 2.0**-10])
def test_float16_metric_of_extreme_length(name, scale):
    """Lengths whose square is no float16 leave the cosine, and so the groups, what they are."""
    reducer = get_method(name)
    normal = torch.randn(2, 26, 8, generator=torch.Generator().manual_seed(3))
    metric = (normal.clamp(-3, 3) * 64).round() / 64  # so that scaling by a power of two is exact in float16
    options = {"protected": 1} | extras(reducer, 2, 26, 25)
    scaled = (metric * scale).half()
    assert torch.equal(scaled.float() / scale, metric)
    assert torch.equal(reducer.match(scaled, 9, **options).group, reducer.match(metric, 9, **options).group)


# NaN and infinity.


@each(SEEING)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@fast
@given(drawn=tokens(flavours=("positive",)), count=st.integers(1, 6), where=st.integers(0, 4))
def test_a_token_that_is_no_number_is_similar_to_nothing(name, bad, drawn, count, where):
    """Put behind ordinary tokens it changes nothing for them: they merge as without it, and it stays alone."""
    reducer = get_method(name)
    t = drawn.make(reducer)
    if "grid" in reducer.needs:
        return
    broken = torch.ones(drawn.batch, count, drawn.channels)
    broken[:, :, where % drawn.channels] = bad
    one = torch.ones(drawn.batch, count, 1)
    options = t.options | {"size": torch.cat([t.size, one], 1)} | extras(reducer, drawn.batch, t.n + count, t.patches)
    merge = reducer.match(torch.cat([t.metric, broken], 1), t.r, **options)
    assert torch.equal(merge.group[:, : t.n], reducer.match(t.metric, t.r, **t.options).group)
    assert (merge.group[:, t.n :] == torch.arange(t.n - t.r, t.n - t.r + count)).all()


@each(SEEING)
@fast
@given(drawn=tokens(flavours=("normal", "duplicates")), bad=st.sampled_from((math.nan, math.inf)))
def test_a_token_that_is_no_number_counts_as_a_zero_vector(name, drawn, bad):
    """Its cosine to anything is 0, wherever it stands and whatever the others are."""
    reducer = get_method(name)
    t = drawn.make(reducer)
    some = torch.rand(drawn.batch, t.n, 1, generator=torch.Generator().manual_seed(drawn.seed)) < 0.3
    broken, zero = t.metric.clone(), t.metric.masked_fill(some, 0.0)
    broken[..., :1] = broken[..., :1].masked_fill(some, bad)  # one bad channel spoils the token
    groups = [reducer.match(metric, t.r, **t.options).group for metric in (broken, zero)]
    assert torch.equal(*groups)


@each(GROUPING)
@fast
@given(drawn=tokens(), bad=st.sampled_from((math.nan, math.inf)))
def test_a_broken_feature_stays_inside_its_group(name, drawn, bad):
    reducer = get_method(name)
    t = drawn.make(reducer)
    merge = reducer.match(t.metric, t.r, **t.options)
    for token in range(t.n):
        x = t.x.clone()
        x[0, token] = bad
        broken = torch.zeros(drawn.batch, merge.count, dtype=torch.bool)
        if merge.group[0, token] >= 0:
            broken[0, merge.group[0, token]] = True
        features, _ = merge.reduce(x, t.size)
        assert torch.equal(features.isfinite().all(-1), ~broken)


# expand and then.


@each(GROUPING)
@fast
@given(drawn=tokens())
def test_expand_gives_every_token_the_value_of_its_group(name, drawn):
    reducer = get_method(name)
    t = drawn.make(reducer)
    merge = reducer.match(t.metric, t.r, **t.options)
    y = torch.randn(drawn.batch, merge.count, 2, generator=torch.Generator().manual_seed(drawn.seed))
    expanded = merge.expand(y)
    assert expanded.shape == (drawn.batch, t.n, 2)
    for row in range(drawn.batch):
        for i, group in enumerate(merge.group[row].tolist()):
            assert torch.equal(expanded[row, i], y[row, group] if group >= 0 else torch.zeros(2))


@each(AVERAGING)
@fast
@given(drawn=tokens())
def test_reduce_after_expand_is_the_identity(name, drawn):
    reducer = get_method(name)
    t = drawn.make(reducer)
    merge = reducer.match(t.metric, t.r, **t.options)
    features, _ = merge.reduce(t.x, t.size)
    torch.testing.assert_close(merge.reduce(merge.expand(features), t.size)[0], features)


def chain(reducer: Reducer, t: SimpleNamespace, drawn: Tokens, steps: int) -> list[Merge]:
    """``steps`` merges, each of what the one before leaves, by the drawn share of what is possible."""
    metric, size, patches, merges = t.metric, t.size, t.patches, []
    for _ in range(steps):
        possible = removable(reducer, patches)
        r = possible[round(drawn.share * (len(possible) - 1))]
        options = t.options | {"size": size} | extras(reducer, drawn.batch, metric.shape[1], patches)
        merges.append(reducer.match(metric, r, **options))
        metric, _ = merges[-1].reduce(metric, size)
        size = merges[-1].reduce(t.x[:, : size.shape[1]], size)[1]
        patches -= r
    return merges


STEPPING = [name for name in GROUPING if not METHODS[name].reducer.once]


@each(STEPPING)
@fast
@given(drawn=tokens(), steps=st.integers(2, 4))
def test_then_is_one_merge_after_the_other(name, drawn, steps):
    reducer = get_method(name)
    t = drawn.make(reducer)
    merges = chain(reducer, t, drawn, steps)
    whole = merges[0]
    features, sizes = whole.reduce(t.x, t.size)
    group = whole.group
    for merge in merges[1:]:
        whole = whole.then(merge)
        features, sizes = merge.reduce(features, sizes)
        group = torch.where(group >= 0, merge.group.gather(1, group.clamp(min=0)), -1)
    assert whole.count == merges[-1].count and torch.equal(whole.group, group)
    for row in range(drawn.batch):
        first = [min(tokens) for tokens in members(whole, row)]
        assert first == sorted(first)
    whole_features, whole_sizes = whole.reduce(t.x, t.size)
    torch.testing.assert_close(whole_features, features, rtol=1e-5, atol=1e-5)
    assert torch.equal(whole_sizes, sizes)
    expanded = whole.expand(features)
    for row in range(drawn.batch):
        for i, number in enumerate(group[row].tolist()):
            assert torch.equal(expanded[row, i], features[row, number] if number >= 0 else torch.zeros(5))


@each([name for name in STEPPING if name in AVERAGING])
@fast
@given(drawn=tokens(), steps=st.integers(2, 3))
def test_weighted_means_compose(name, drawn, steps):
    """Steps that track sizes leave the mean of the original patches, however many steps there were."""
    reducer = get_method(name)
    t = drawn.make(reducer)
    first, *later = chain(reducer, t, drawn, steps)
    whole = first
    for merge in later:
        whole = whole.then(merge)
    features, _ = whole.reduce(t.x, t.size)
    torch.testing.assert_close(features.double(), mean_of_groups(whole, t.x, t.size), rtol=1e-5, atol=1e-5)


@each(STEPPING)
@fast
@given(drawn=tokens())
def test_then_is_associative(name, drawn):
    reducer = get_method(name)
    t = drawn.make(reducer)
    a, b, c = chain(reducer, t, drawn, 3)
    left, right = a.then(b).then(c), a.then(b.then(c))
    assert left.count == right.count and torch.equal(left.group, right.group)
    torch.testing.assert_close(left.reduce(t.x, t.size), right.reduce(t.x, t.size))


@each(GROUPING)
@fast
@given(drawn=tokens())
def test_source_order_renumbers_the_same_groups(name, drawn):
    """Protected tokens still come first; features, sizes and expansion follow the new numbers."""
    reducer = get_method(name)
    t = drawn.make(reducer)
    reading = reducer.match(t.metric, t.r, **t.options)
    source = reading.in_source_order()
    p = drawn.protected
    assert source.count == reading.count and torch.equal(source.group[:, :p], reading.group[:, :p])
    order = torch.empty(drawn.batch, reading.count, dtype=torch.int64)  # the old number of each new one
    for row in range(drawn.batch):
        pairs = set(zip(reading.group[row].tolist(), source.group[row].tolist(), strict=True)) - {(-1, -1)}
        old, new = (sorted(column) for column in zip(*pairs, strict=True))
        assert old == new == list(range(reading.count))
        order[row, [pair[1] for pair in pairs]] = torch.tensor([pair[0] for pair in pairs])
    features, sizes = source.reduce(t.x, t.size)
    before, sizes_before = reading.reduce(t.x, t.size)
    assert torch.equal(features, before.gather(1, order[..., None].expand(-1, -1, 5)))
    assert torch.equal(sizes, sizes_before.gather(1, order[..., None]))
    assert torch.equal(source.expand(features), reading.expand(before))


# Gradients.


@each(NAMES)
@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double")
@pytest.mark.filterwarnings("ignore:The .*input requires gradient and is not a double precision")
@pytest.mark.parametrize("patches, protected, share", [(9, 1, 1.0), (4, 0, 0.5), (9, 0, 0.0)])
def test_gradients_flow_through_reduce(name, patches, protected, share):
    """`reduce` accumulates in float32 and is linear in x, so large steps make finite differences exact enough."""
    reducer = get_method(name)
    t = Tokens("normal", 2, patches, protected, 4, share, 0.5, seed=7).make(reducer)
    merge = reducer.match(t.metric, t.r, **t.options)
    x = t.x[..., :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: merge.reduce(v, t.size)[0], x, eps=0.5, atol=1e-3, rtol=1e-3)


@each(AVERAGING)
@fast
@given(drawn=tokens())
def test_every_token_gets_its_share_of_the_gradient(name, drawn):
    reducer = get_method(name)
    t = drawn.make(reducer)
    merge = reducer.match(t.metric.requires_grad_(), t.r, **t.options)
    x = t.x.requires_grad_()
    features, sizes = merge.reduce(x, t.size)
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(drawn.seed))
    (features * weight).sum().backward()
    expected = merge.expand(weight) * t.size / merge.expand(sizes).clamp(min=1)
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-5)


# No synchronisation with the host.

WAITING = ("nonzero", "_local_scalar_dense", "item", "masked_select", "unique", "equal.default", "is_nonzero", "tolist")


class Recorder(TorchDispatchMode):
    """Notes every operation on tensors, and the kinds of device it reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, set[str]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, Tensor)]
        self.operations.append((str(function), {value.device.type for value in tensors}))
        return result


def hot_case(name: str, device: str = "cpu"):
    """match, reduce, expand and then, as a function of tensors alone; and three tensors for it."""
    reducer = get_method(name)
    t = Tokens("normal", 2, 16, 1, 4, 0.75, 0.6, seed=5).make(reducer)
    left = t.patches - t.r
    options, later = (
        {
            key: value.to(device) if isinstance(value, Tensor) else value
            for key, value in options.items()
            if key != "size"
        }
        for options in (t.options, t.options | ({} if reducer.once else extras(reducer, 2, left + 1, left)))
    )

    def run(metric: Tensor, x: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        merge = reducer.match(metric, t.r, size=size, **options)
        features, sizes = merge.reduce(x, size)
        if merge.group is None or reducer.once:
            return features, sizes
        whole = merge.then(reducer.match(features, min(1, reducer.max_removable(left)), size=sizes, **later))
        features, sizes = whole.reduce(x, size)
        return features, sizes, whole.group, whole.expand(features)

    return run, tuple(value.to(device) for value in (t.metric, t.x, t.size))


@each(NAMES)
def test_no_value_is_read_and_nothing_is_copied_to_the_device(name):
    """The meta device holds no values: reading one fails, and a copy from the host shows up as such.

    Both would make a GPU wait for the host, and neither can be captured in a CUDA graph. The first call is not
    counted, so that a constant may be made once.
    """
    run, inputs = hot_case(name, "meta")
    run(*inputs)
    with Recorder() as recorder:
        results = run(*inputs)
    assert all(result.device.type == "meta" for result in results)
    assert recorder.operations
    mixed = [operation for operation, devices in recorder.operations if devices - {"meta"}]
    assert not mixed, f"{name} moves values between host and device: {sorted(set(mixed))}"


@each(NAMES)
def test_no_operation_waits_for_its_result(name):
    run, inputs = hot_case(name)
    with Recorder() as recorder:
        run(*inputs)
    waiting = [op for op, _ in recorder.operations if any(word in op for word in WAITING)]
    assert not waiting, f"{name} waits for {sorted(set(waiting))}"


@each(NAMES)
def test_a_trace_serves_other_values(name):
    """Traced on fake tensors, the graph gives the groups of any values: no Python branch depends on them."""
    run, inputs = hot_case(name)
    graph = make_fx(run, tracing_mode="fake")(*inputs)
    random = torch.Generator().manual_seed(11)
    for _ in range(3):
        other = (*(torch.randn(value.shape, generator=random) for value in inputs[:2]), inputs[2] + 1)
        for traced, eager in zip(graph(*other), run(*other), strict=True):
            torch.testing.assert_close(traced, eager)


# The table of methods.


def test_the_first_methods_are_there():
    first = {"pitome", "pitome-bsm", "pitome-llava", "pitome-tuned", "tome", "random", "pool"}
    assert first <= set(METHODS)


@each(NAMES)
def test_every_method_is_described(name):
    method = METHODS[name]
    assert issubclass(method.reducer, Reducer) and isinstance(get_method(name), method.reducer)
    assert method.summary and "\n" not in method.summary and method.reference
    known = {field.name for field in dataclasses.fields(method.reducer)}
    assert set(method.options) <= known
    assert method.reducer.needs <= {"attention", "query", "grid"}
    settings_of_attach = {
        "metric",
        "place",
        "weighted",
        "proportional_attention",
        "order",
        "positions",
        "llm_size_bias",
    }
    assert set(method.settings) <= settings_of_attach
    assert method.reducer.__doc__


@each(NAMES)
def test_options_reach_the_reducer(name):
    reducer = get_method(name)
    for field in dataclasses.fields(reducer):
        value = getattr(reducer, field.name)
        assert getattr(get_method(name, **{field.name: value}), field.name) == value
    with pytest.raises(ValueError, match="'no_such_option'"):
        get_method(name, no_such_option=1)


def test_presets_are_not_each_others_copies():
    metric = torch.randn(2, 41, 6, generator=torch.Generator().manual_seed(0))
    groups = {name: get_method(name).match(metric, 12, protected=1).group for name in ("pitome", "pitome-bsm", "tome")}
    assert len({tuple(group.flatten().tolist()) for group in groups.values()}) == 3


def test_an_unknown_method_is_named_with_the_nearest_and_all_choices():
    with pytest.raises(ValueError, match=r"'pitom'.*did you mean 'pitome'") as caught:
        get_method("pitom")
    assert all(name in str(caught.value) for name in METHODS)
    with pytest.raises(ValueError, match="'xyzzy'"):
        get_method("xyzzy")


@pytest.mark.parametrize(
    "name, option, value, possible", [("pitome", "energy", "elus", "elu"), ("pitome", "energy", "x", "paper")]
)
def test_an_option_out_of_range_names_what_is_possible(name, option, value, possible):
    with pytest.raises(ValueError, match=repr(value)) as caught:
        get_method(name, **{option: value})
    assert possible in str(caught.value)


# Particular to one method.


def test_random_depends_on_its_seed_alone():
    metrics = [torch.randn(3, 30, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    groups = [get_method("random").match(metric, 20, protected=1).group for metric in metrics]
    assert torch.equal(*groups)
    other = get_method("random", seed=1).match(metrics[0], 20, protected=1).group
    assert not torch.equal(groups[0], other)
    assert (groups[0] == -1).sum(1).tolist() == [20, 20, 20]


def test_random_removes_every_token_about_equally_often():
    dropped = torch.stack(
        [get_method("random", seed=seed).match(torch.ones(1, 20, 2), 10).group[0] < 0 for seed in range(400)]
    )
    assert (dropped.float().mean(0) - 0.5).abs().max() < 0.12  # nearly five standard deviations


@pytest.mark.parametrize("grid", [(4, 4), (6, 6), (24, 24), (3, 5), (2, 12), (1, 7)])
@pytest.mark.parametrize("protected", [0, 1])
def test_pool_cuts_the_grid_into_cells(grid, protected):
    """Every group is a rectangle of neighbours, and sides differ by one patch at most."""
    height, width = grid
    patches = height * width
    reducer = get_method("pool")
    reached = 0
    for keep in sorted({a * b for a in range(1, height + 1) for b in range(1, width + 1)})[:40]:
        merge = reducer.match(torch.ones(1, patches + protected, 2), patches - keep, protected=protected, grid=grid)
        sides = set()
        for group in members(merge, 0)[protected:]:
            cells = [divmod(i - protected, width) for i in group]
            rows, columns = ({cell[axis] for cell in cells} for axis in (0, 1))
            assert len(cells) == len(rows) * len(columns)
            assert max(rows) - min(rows) == len(rows) - 1 and max(columns) - min(columns) == len(columns) - 1
            sides.add((len(rows), len(columns)))
        for axis in (0, 1):
            lengths = {side[axis] for side in sides}
            assert max(lengths) - min(lengths) <= 1
        reached += merge.count == keep + protected
    assert reached > 0


def test_pool_to_a_count_that_no_cells_give_is_an_error_with_neighbours():
    with pytest.raises(ValueError, match="31") as caught:
        get_method("pool").match(torch.ones(1, 36, 2), 36 - 31, grid=(6, 6))
    assert "30" in str(caught.value) or "36" in str(caught.value)


@pytest.mark.parametrize("side", [4, 6, 24])
def test_pool_allows_exactly_the_products(side):
    products = {a * b for a in range(1, side + 1) for b in range(1, side + 1)}
    assert set(get_method("pool").allowed(side * side)) == products
