"""Every method in low precision, with NaN and infinity, and under gradients."""

from __future__ import annotations

import math

import pytest
import torch
from drawn import AVERAGING, GROUPING, NAMES, SEEING, SELECTING, Tokens, each, extras, fast, tokens
from hypothesis import given
from hypothesis import strategies as st

from pitome_mllm.methods import METHODS, get_method

# Precision.


@each(NAMES)
@fast
@given(
    drawn=tokens(flavours=("normal", "positive", "duplicates", "equal", "zero", "one hot")),
    dtype=st.sampled_from((torch.float16, torch.bfloat16)),
)
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
def test_large_groups_neither_overflow_nor_stall(name):
    """Summed in float16, 288 times 60000 is infinite; summed in bfloat16, 1 + 1 + ... stays at 256."""
    reducer = get_method(name)
    keep = 1 if reducer.once else 576 - min(288, reducer.max_removable(576))
    merge = reducer.match(torch.ones(1, 576, 2), 576 - keep, **extras(reducer, 1, 576, 576))
    for dtype, value in ((torch.float16, 60000.0), (torch.bfloat16, 1.0078125)):
        x = torch.full((1, 576, 2), value, dtype=dtype)
        features, sizes = merge.reduce(x, torch.ones(1, 576, 1))
        assert torch.equal(features, x[:, :keep])
        assert sizes.max() > 256 or name in SELECTING


@each(SEEING)
def test_float16_metric_of_extreme_length(name):
    """Lengths whose square is no float16 leave the cosine, and so the groups, what they are."""
    reducer = get_method(name)
    normal = torch.randn(2, 26, 8, generator=torch.Generator().manual_seed(3))
    metric = (normal.clamp(-3, 3) * 64).round() / 64  # so that scaling by a power of two is exact in float16
    options = {"protected": 1} | extras(reducer, 2, 26, 25)
    for scale in (2.0**13, 2.0**-10):
        scaled = (metric * scale).half()
        assert torch.equal(scaled.float() / scale, metric)
        assert torch.equal(reducer.match(scaled, 9, **options).group, reducer.match(metric, 9, **options).group)


# NaN and infinity.


# Elsewhere attention decides, tokens are dropped, or how many are candidates depends on how many there are.
BY_SIMILARITY = [name for name in SEEING if name not in SELECTING and "attention" not in METHODS[name].reducer.needs]


@each(BY_SIMILARITY)
@fast
@given(
    drawn=tokens(flavours=("positive",)),
    bad=st.sampled_from((math.nan, math.inf, -math.inf)),
    count=st.integers(1, 6),
    where=st.integers(0, 4),
)
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


# Gradients.


@each(NAMES)
@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double")
@pytest.mark.filterwarnings("ignore:The .*input requires gradient and is not a double precision")
def test_gradients_flow_through_reduce(name):
    """`reduce` accumulates in float64 where x has it, so finite differences are exact enough."""
    reducer = get_method(name)
    t = Tokens("normal", 2, 9, 1, 4, 1.0, 0.5, seed=7).make(reducer)
    merge = reducer.match(t.metric, t.r, **t.options)
    x = t.x[..., :2].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: merge.reduce(v, t.size)[0], x)


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


# Autocast.


@each(NAMES)
@fast
@given(drawn=tokens(flavours=("normal", "positive", "duplicates", "some zero")))
def test_autocast_changes_neither_groups_nor_values(name, drawn):
    """Merges are decided in float32 also where the surrounding model runs under autocast."""
    reducer = get_method(name)
    t = drawn.make(reducer)
    merge = reducer.match(t.metric, t.r, **t.options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = reducer.match(t.metric, t.r, **t.options)
        features, sizes = cast.reduce(t.x, t.size)
    if merge.group is not None:
        assert torch.equal(cast.group, merge.group)
    expected, expected_sizes = merge.reduce(t.x, t.size)
    assert torch.equal(features, expected) and torch.equal(sizes, expected_sizes)


def test_no_call_asks_what_torch_2_11_cannot_compile(monkeypatch):
    """Whether a device knows autocast is asked at import: inside a compiled graph that question breaks it."""

    def cannot(kind: str) -> bool:
        raise AssertionError("asked within a call")

    monkeypatch.setattr(torch.amp, "is_autocast_available", cannot)
    monkeypatch.setattr(torch._C, "_is_autocast_available", cannot)
    get_method("pitome").match(torch.randn(1, 9, 4), 3)
