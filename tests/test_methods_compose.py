"""Every method's `expand`, `then` and source order."""

from __future__ import annotations

import torch
from drawn import AVERAGING, GROUPING, STEPPING, chain, each, fast, mean_of_groups, members, tokens
from hypothesis import given
from hypothesis import strategies as st

from pitome_mllm.methods import get_method


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
