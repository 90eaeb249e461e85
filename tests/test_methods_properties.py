"""What holds for every method, whatever the tokens: exact counts, numbering, conservation, independence."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from drawn import (
    AVERAGING,
    FINITE,
    FLAVOURS,
    NAMES,
    TOKENS,
    Tokens,
    each,
    extras,
    fast,
    mean_of_groups,
    members,
    of_row,
    removable,
    tokens,
)
from hypothesis import given

from pitome_mllm.methods import METHODS, get_method

# Counts, numbering, and what must not change.


def assert_sound(name: str, drawn: Tokens) -> None:
    """All that a merge of these tokens must be, whatever the method."""
    reducer = get_method(name)
    t = drawn.make(reducer)
    merge = reducer.match(t.metric, t.r, **t.options)
    features, sizes = merge.reduce(t.x, t.size)
    p, count = drawn.protected, t.n - t.r
    assert merge.count == count
    assert features.shape == (drawn.batch, count, 5) and features.dtype == t.x.dtype
    assert sizes.shape == (drawn.batch, count, 1) and sizes.dtype == torch.float32
    assert features.isfinite().all() and sizes.isfinite().all() and (sizes > 0).all()
    if merge.energy is not None:
        assert merge.energy.shape == (drawn.batch, t.patches) and merge.energy.dtype == torch.float32
        assert merge.energy.isfinite().all()
    assert torch.equal(features[:, :p], t.x[:, :p]) and torch.equal(sizes[:, :p], t.size[:, :p])
    if t.r == 0:
        assert torch.equal(features, t.x) and torch.equal(sizes, t.size)
    if merge.group is not None:
        assert_sound_groups(merge, t, drawn, features, sizes)
        if name in AVERAGING:
            expected = mean_of_groups(merge, t.x, t.size)
            torch.testing.assert_close(features.double(), expected, rtol=1e-5, atol=1e-5)


def assert_sound_groups(merge, t, drawn, features, sizes) -> None:
    """In reading order, none empty; protected tokens alone; sizes those of the members; a lone token as it was."""
    assert merge.group.shape == (drawn.batch, t.n) and merge.group.dtype == torch.int64
    for row, group in enumerate(merge.group.tolist()):
        assert min(group) >= -1 and max(group) < merge.count
        together = members(merge, row)
        first = [min(group) for group in together]  # min() of an empty group fails
        assert first == sorted(first)
        assert together[: drawn.protected] == [[i] for i in range(drawn.protected)]
        assert sizes[row, :, 0].tolist() == [t.size[row, group].sum().item() for group in together]
        alone = [(k, group[0]) for k, group in enumerate(together) if len(group) == 1]
        assert all(torch.equal(features[row, k], t.x[row, i]) for k, i in alone)


@each(NAMES)
@fast
@given(drawn=tokens())
def test_a_merge_is_sound(name, drawn):
    assert_sound(name, drawn)


@each(NAMES)
def test_every_kind_of_tokens_in_every_number(name):
    """Drawn examples leave gaps; this walks through all combinations of kind, number and share."""
    for flavour, patches, share in itertools.product(FLAVOURS, TOKENS, (1.0, 0.5)):
        assert_sound(name, Tokens(flavour, 1, patches, patches % 2, 4, share, 0.5, seed=patches))


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
def test_removing_more_than_possible_is_an_error_that_helps(name):
    reducer, patches = get_method(name), 9
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


def test_tokens_without_a_neighbour_rank_in_reading_order():
    """Their cosine to themselves is all they have, and its rounding ranks nothing: each has energy 1 / N exactly."""
    drawn = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(0))
    for metric in (drawn, drawn.mT.contiguous().mT):
        merge = get_method("pitome", margin=0.9, alpha=0.0).match(metric, 5)
        assert torch.equal(merge.energy, torch.full((3, 40), 1 / 40))
        for row in range(3):
            assert {i for group in members(merge, row) if len(group) > 1 for i in group} <= set(range(10))


@pytest.mark.parametrize(
    "name, options",
    [(name, {}) for name in ("pitome", "pitome-bsm", "pitome-llava", "tome")] + [("pitome", METHODS["pitome"].library)],
)
@pytest.mark.parametrize("depth", [0.0, 22 / 23])
@pytest.mark.parametrize("protected", [0, 1])
def test_among_equals_the_first_merge(name, options, protected, depth):
    """Stable sorts: of tokens that are all alike, the first 2r are the ones that merge."""
    metric = torch.tensor([1.0, 0.0, 0.0]).expand(2, 24 + protected, 3)
    merge = get_method(name, **options).match(metric, 5, protected=protected, depth=depth)
    for row in range(2):
        merged = [i for group in members(merge, row) if len(group) > 1 for i in group]
        assert max(merged) < protected + 10
