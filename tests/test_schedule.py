"""Schedules: the published ratios, exact landing on every count that can be reached, and errors that say what can."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pitome_mllm.methods import METHODS, get_method
from pitome_mllm.schedule import SHAPES, Schedule, projector_counts

PATCHES, BLOCKS = 576, 23  # LLaVA-1.5: 24 x 24 patches; features are read after 23 blocks
PUBLISHED = {0.85: 17, 0.875: 30, 0.9: 54, 0.925: 101, 0.95: 183, 0.975: 330}

fast = settings(derandomize=True, deadline=None, max_examples=200, database=None)


def fewest(tokens: int, blocks: int) -> int:
    """The smallest count reachable when a block removes at most half: halved, rounded up, once per block."""
    for _ in range(blocks):
        tokens = math.ceil(tokens / 2)
    return tokens


def check(counts: list[int], tokens: int, blocks: int, keep: int) -> None:
    """Lands on ``keep``, never grows, and loses at most half per block."""
    assert len(counts) == blocks and all(type(count) is int for count in counts)
    before = [tokens, *counts[:-1]]
    assert all(math.ceil(b / 2) <= after <= b for b, after in zip(before, counts, strict=True)), counts
    assert counts[-1] == keep


def refused(tokens: int = PATCHES, blocks: int = BLOCKS, **arguments: Any) -> str:
    """The message with which these arguments are refused, when made or when asked for counts."""
    with pytest.raises(ValueError) as caught:
        Schedule(**arguments).counts(tokens, blocks)
    message = str(caught.value)
    assert any(advice in message for advice in ("choose", "give", "are possible")), message
    return message


# ratio


@pytest.mark.parametrize("ratio, left", PUBLISHED.items())
def test_published_ratios(ratio, left):
    counts = Schedule(ratio=ratio).counts(PATCHES, BLOCKS)
    check(counts, PATCHES, BLOCKS, left)


@pytest.mark.parametrize("ratio", [*PUBLISHED, 0.5, 0.6, 0.75, 1.0])
def test_a_block_removes_the_floor_of_n_minus_rho_n(ratio):
    for tokens in range(1, 1025):
        removed = tokens - Schedule(ratio=ratio).counts(tokens, 1)[0]
        assert removed == math.floor(tokens - Fraction(str(ratio)) * tokens)


@fast
@given(ratio=st.floats(0.01, 1), tokens=st.integers(1, 2000), blocks=st.integers(1, 32))
def test_any_ratio_follows_the_formula_capped_at_half(ratio, tokens, blocks):
    """In this order in floating point or in exact rationals: both are meant, and may differ by one."""
    for after in Schedule(ratio=ratio).counts(tokens, blocks):
        floating = math.floor(tokens - ratio * tokens)
        exact = math.floor(tokens - Fraction(str(ratio)) * tokens)
        assert tokens - after in {min(floating, tokens // 2), min(exact, tokens // 2)}
        tokens = after


def test_ratio_at_nine_tenths_is_not_off_by_one():
    """floor(N * (1 - .9)) would remove 0 of 10 and 56 of 570, because 1 - .9 is a little less than .1."""
    assert [tokens - Schedule(ratio=0.9).counts(tokens, 1)[0] for tokens in (10, 20, 570)] == [1, 2, 57]


def test_ratio_one_keeps_everything():
    assert Schedule(ratio=1.0).counts(PATCHES, 5) == [PATCHES] * 5
    assert Schedule(ratio=1).counts(PATCHES, 5) == [PATCHES] * 5


def test_ratio_keeps_at_least_one_token():
    assert Schedule(ratio=0.01).counts(PATCHES, 40)[-1] == 1


@pytest.mark.parametrize("ratio", [0, 0.0, -0.5, 1.0001, 2, math.nan, math.inf, True, False, "0.9"])
def test_ratio_out_of_range(ratio):
    message = refused(ratio=ratio)
    assert repr(ratio) in message and "ratio" in message and "1" in message


# keep


@pytest.mark.parametrize("blocks", [4, 5, 7, 11, 12, 23, 24, 26, 32])
def test_every_count_is_reached_exactly_where_possible(blocks):
    lowest = fewest(PATCHES, blocks)
    assert lowest == math.ceil(PATCHES / 2**blocks)
    for keep in range(1, PATCHES + 1):
        if keep >= lowest:
            check(Schedule(keep=keep).counts(PATCHES, blocks), PATCHES, blocks, keep)
        else:
            message = refused(PATCHES, blocks, keep=keep)
            assert all(str(number) in message for number in (keep, lowest, PATCHES)), message


@pytest.mark.parametrize("shape", SHAPES)
@fast
@given(tokens=st.integers(1, 1200), blocks=st.integers(1, 40), data=st.data())
def test_every_shape_lands_exactly(shape, tokens, blocks, data):
    keep = data.draw(st.integers(fewest(tokens, blocks), tokens))
    check(Schedule(keep=keep, shape=shape).counts(tokens, blocks), tokens, blocks, keep)


@pytest.mark.parametrize("shape", SHAPES)
@fast
@given(blocks=st.integers(4, 32), keep=st.integers(1, PATCHES))
def test_every_shape_on_the_real_geometry(shape, blocks, keep):
    if keep < fewest(PATCHES, blocks):
        message = refused(PATCHES, blocks, keep=keep, shape=shape)
        assert str(keep) in message and f"{fewest(PATCHES, blocks)} to {PATCHES}" in message
    else:
        check(Schedule(keep=keep, shape=shape).counts(PATCHES, blocks), PATCHES, blocks, keep)


@pytest.mark.parametrize("shape", SHAPES)
def test_keeping_everything_removes_nothing(shape):
    assert Schedule(keep=PATCHES, shape=shape).counts(PATCHES, BLOCKS) == [PATCHES] * BLOCKS
    assert Schedule(keep=1.0, shape=shape).counts(PATCHES, BLOCKS) == [PATCHES] * BLOCKS


def test_shapes_differ_and_the_default_is_equal():
    ways = {shape: tuple(Schedule(keep=144, shape=shape).counts(PATCHES, BLOCKS)) for shape in SHAPES}
    assert set(SHAPES) == {"equal", "early", "delayed", "last"}
    assert len(set(ways.values())) == len(SHAPES)
    assert tuple(Schedule(keep=144).counts(PATCHES, BLOCKS)) == ways["equal"]


def test_equal_removes_about_the_same_share_in_every_block():
    before, shares = PATCHES, []
    for after in Schedule(keep=144).counts(PATCHES, BLOCKS):
        shares.append(after / before)
        before = after
    assert max(shares) - min(shares) < 0.01


@pytest.mark.parametrize("fraction, count", [(1.0, 576), (0.25, 144), (0.5, 288), (0.125, 72), (1 / 576, 1), (1e-9, 1)])
def test_a_float_is_a_fraction(fraction, count):
    assert Schedule(keep=fraction).counts(PATCHES, BLOCKS)[-1] == count


@fast
@given(fraction=st.floats(0, 1, exclude_min=True), tokens=st.integers(1, 1200))
def test_any_fraction_lands_beside_its_exact_value(fraction, tokens):
    count = Schedule(keep=fraction).counts(tokens, 32)[-1]
    assert 1 <= count <= tokens and (count == 1 or abs(count - fraction * tokens) < 1)


def test_one_is_a_count_and_one_point_zero_everything():
    assert Schedule(keep=1).counts(PATCHES, BLOCKS)[-1] == 1
    assert Schedule(keep=1.0).counts(PATCHES, BLOCKS)[-1] == PATCHES


@pytest.mark.parametrize(
    "keep", [0, -1, 577, 10**6, 0.0, -0.25, 1.0001, 576.0, math.nan, math.inf, -math.inf, True, False, "144", [144]]
)
def test_keep_out_of_range(keep):
    message = refused(keep=keep)
    assert repr(keep) in message and "keep" in message and "1" in message
    if type(keep) is int and keep > PATCHES:
        assert str(PATCHES) in message


def test_the_smallest_reachable_count_is_named():
    message = refused(PATCHES, 4, keep=35)
    assert "35" in message and "36 to 576" in message and "4 blocks" in message
    check(Schedule(keep=36).counts(PATCHES, 4), PATCHES, 4, 36)


def test_without_blocks_only_everything_can_be_kept():
    assert Schedule(keep=PATCHES).counts(PATCHES, 0) == []
    message = refused(PATCHES, 0, keep=144)
    assert "144" in message and "576" in message


def test_the_same_request_gives_the_same_counts_in_a_list_of_its_own():
    schedule = Schedule(keep=144)
    first = schedule.counts(PATCHES, BLOCKS)
    first.clear()
    assert schedule.counts(PATCHES, BLOCKS) == Schedule(keep=144).counts(PATCHES, BLOCKS) != []
    explicit = Schedule(counts=[300, 200])
    explicit.counts(PATCHES, 2).clear()
    assert explicit.counts(PATCHES, 2) == [300, 200]


# merges: a few of the blocks.


def points(keep: int, merges: int | str, blocks: int = BLOCKS, shape: str = "equal") -> list[int]:
    """The blocks that remove tokens."""
    counts = Schedule(keep=keep, merges=merges, shape=shape).counts(PATCHES, blocks)
    return [n for n, (before, after) in enumerate(zip([PATCHES, *counts], counts, strict=False)) if after < before]


@pytest.mark.parametrize(
    "merges,blocks,shape,where",
    [
        (6, 23, "equal", [1, 4, 7, 10, 13, 16]),  # CLIP's tower in LLaVA-1.5
        (6, 26, "equal", [1, 4, 8, 11, 15, 18]),  # SigLIP's in LLaVA-OneVision
        (4, 12, "equal", [1, 3, 6, 8]),
        (6, 11, "equal", [0, 2, 4, 6, 8, 10]),  # of few blocks all may merge
        (6, 6, "equal", [0, 1, 2, 3, 4, 5]),
        (6, 4, "equal", [0, 1, 2, 3]),
        (20, 23, "equal", list(range(1, 21))),  # more than three quarters have
        (22, 23, "equal", list(range(1, 23))),
        (6, 23, "early", [1, 4, 6, 9, 11, 14]),
        (6, 23, "delayed", [8, 11, 14, 16, 19, 22]),
        (6, 23, "last", [17, 18, 19, 20, 21, 22]),
        (20, 23, "delayed", list(range(3, 23))),
        (1, 23, "equal", [1]),
    ],
)
def test_where_few_merges_are(merges, blocks, shape, where):
    assert points(360, merges, blocks, shape) == where


@fast
@given(blocks=st.integers(1, 40), merges=st.integers(1, 45), shape=st.sampled_from(sorted(SHAPES)), data=st.data())
def test_few_merges_land_exactly_and_remove_equal_shares_up_to_two_fifths(blocks, merges, shape, data):
    tokens = data.draw(st.integers(1, 1200))
    keep = data.draw(st.integers(fewest(tokens, blocks), tokens))
    counts = Schedule(keep=keep, merges=merges, shape=shape).counts(tokens, blocks)
    check(counts, tokens, blocks, keep)
    needed = next((m for m in range(merges, blocks) if gently(tokens, m) <= keep), blocks)
    if gently(tokens, blocks) > keep:  # over 40 % whatever is done
        assert counts == Schedule(keep=keep, shape=shape).counts(tokens, blocks)
        return
    left = [after for b, after in zip([tokens, *counts], counts, strict=False) if after < b]
    assert all(b - after <= max(0.4 * b, 1) for b, after in zip([tokens, *left], left, strict=False))
    assert len(left) <= needed and (needed > merges or len(left) <= merges)
    if needed < blocks and keep > tokens * 0.65**needed + needed:  # far from that limit: equal shares
        ideal = {round(tokens * (keep / tokens) ** (point / needed)) for point in range(1, needed + 1)}
        assert set(left) == ideal - {tokens}


def gently(tokens: int, merges: int) -> int:
    """The smallest count that so many merges of at most 40 %, or of one token, leave."""
    for _ in range(merges):
        tokens -= min(max(2 * tokens // 5, 1), tokens // 2)
    return tokens


@pytest.mark.parametrize("blocks", [6, 11, 22, 23, 26])
def test_six_merges_for_every_keep(blocks):
    """Exact; six points, or fewer where fewer tokens go; one more where a point would remove over 40 %."""
    for keep in range(fewest(PATCHES, blocks), PATCHES + 1):
        counts = Schedule(keep=keep, merges=6).counts(PATCHES, blocks)
        check(counts, PATCHES, blocks, keep)
        removed = [b - after for b, after in zip([PATCHES, *counts], counts, strict=False)]
        used = sum(r > 0 for r in removed)
        if keep >= 30:  # 576 * .6 ** 6 = 26.9
            assert used == min(6, PATCHES - keep), (keep, counts)
        if keep >= gently(PATCHES, blocks):  # 27 in 6 blocks, 3 in 11
            assert all(r <= max(0.4 * b, 1) for b, r in zip([PATCHES, *counts], removed, strict=False)), (keep, counts)


def test_merges_in_every_block_are_those_without_a_number():
    for shape in SHAPES:
        assert Schedule(keep=144, shape=shape, merges="every").counts(PATCHES, BLOCKS) == (
            Schedule(keep=144, shape=shape).counts(PATCHES, BLOCKS)
        )
    assert points(144, 99) == points(144, BLOCKS) == list(range(BLOCKS))


def test_few_merges_by_a_method_with_another_limit():
    assert Schedule(keep=144, merges=3).counts(PATCHES, BLOCKS, quarter).count(PATCHES) == 1
    assert len(set(Schedule(keep=144, merges=3).counts(PATCHES, BLOCKS, quarter))) == 6  # .75 ** 5 = .237
    assert len(set(Schedule(keep=144, merges=2).counts(PATCHES, BLOCKS, all_but_one))) == 4  # 40 % still


# What a method can remove in one block.


def quarter(n: int) -> int:
    return n // 4


def all_but_one(n: int) -> int:
    return max(n - 1, 0)


def test_none_is_the_limit_of_bipartite_methods():
    for arguments in ({"keep": 40}, {"ratio": 0.3}, {"counts": [288, 144, 72, 40]}):
        assert Schedule(**arguments).counts(PATCHES, 4, None) == Schedule(**arguments).counts(PATCHES, 4)
    assert Schedule(keep=40).counts(PATCHES, 4, max_removable=None)[-1] == 40


@pytest.mark.parametrize("limit", [quarter, all_but_one])
@pytest.mark.parametrize("shape", SHAPES)
@fast
@given(tokens=st.integers(1, 700), blocks=st.integers(1, 30), data=st.data())
def test_another_limit_is_respected(limit, shape, tokens, blocks, data):
    lowest = tokens
    for _ in range(blocks):
        lowest -= limit(lowest)
    keep = data.draw(st.integers(lowest, tokens))
    before = tokens
    for after in Schedule(keep=keep, shape=shape).counts(tokens, blocks, limit):
        assert before - limit(before) <= after <= before
        before = after
    assert before == keep
    if lowest > 1:
        with pytest.raises(ValueError, match=f"{lowest} to {tokens}"):
            Schedule(keep=lowest - 1, shape=shape).counts(tokens, blocks, limit)


def test_a_limit_caps_the_ratio():
    assert Schedule(ratio=0.5).counts(100, 2, quarter) == [75, 57]
    assert Schedule(ratio=0.9).counts(100, 2, quarter) == [90, 81]


@pytest.mark.parametrize("name", METHODS)
def test_the_limit_of_every_method_is_one(name):
    """`Reducer.max_removable` goes in as it is, and `match` accepts what comes out."""
    reducer = get_method(name)
    counts = Schedule(keep=144).counts(PATCHES, 1 if reducer.once else 6, reducer.max_removable)
    assert counts[-1] == 144
    for before, after in zip([PATCHES, *counts[:-1]], counts, strict=True):
        assert 0 <= before - after <= reducer.max_removable(before)


# counts


def test_explicit_counts_come_back():
    counts = [500, 500, 250, 126, 125]
    assert Schedule(counts=counts).counts(PATCHES, 5) == counts
    assert Schedule(counts=tuple(counts)).counts(PATCHES, 5) == counts
    assert Schedule(counts=[1]).counts(2, 1) == [1]


@fast
@given(tokens=st.integers(1, 1200), blocks=st.integers(1, 30), data=st.data())
def test_what_a_schedule_gives_is_valid_when_given_explicitly(tokens, blocks, data):
    keep = data.draw(st.integers(fewest(tokens, blocks), tokens))
    shape = data.draw(st.sampled_from(sorted(SHAPES)))
    counts = Schedule(keep=keep, shape=shape).counts(tokens, blocks)
    assert Schedule(counts=counts).counts(tokens, blocks) == counts


@pytest.mark.parametrize(
    "counts, named",
    [
        ([300], ["1 ", "3"]),  # too few
        ([500, 400, 300, 200], ["4 ", "3"]),  # too many
        ([], ["0 ", "3"]),
        ([500, 501, 400], ["501", "500"]),  # grows
        ([577, 500, 400], ["577", "576"]),
        ([287, 200, 150], ["287", "288", "576"]),  # more than half at once
        ([400, 300, 149], ["149", "150", "300"]),
        ([576, 576, 0], ["0"]),
        ([576, 576, -1], ["-1"]),
    ],
)
def test_impossible_counts(counts, named):
    message = refused(PATCHES, 3, counts=counts)
    assert all(word in message for word in named), message
    assert "counts" in message


@pytest.mark.parametrize("counts", [[500, 400.0, 300], [500, True, 1], [500, "400", 300], "500", 500, [None, 1, 1]])
def test_counts_that_are_no_integers(counts):
    message = refused(PATCHES, 3, counts=counts)
    assert "counts" in message and repr(counts) in message


def test_a_method_without_the_limit_may_drop_more_than_half():
    assert Schedule(counts=[10, 1]).counts(PATCHES, 2, all_but_one) == [10, 1]
    with pytest.raises(ValueError, match="counts"):
        Schedule(counts=[10, 0]).counts(PATCHES, 2, lambda n: n)


# Combinations.


@pytest.mark.parametrize(
    "arguments",
    [
        {"keep": 144, "ratio": 0.9},
        {"keep": 0.25, "counts": [300, 200]},
        {"ratio": 0.9, "counts": [300, 200]},
        {"keep": 144, "ratio": 0.9, "counts": [300, 200]},
    ],
)
def test_two_of_keep_ratio_and_counts(arguments):
    message = refused(**arguments)
    assert all(f"{name}={value}" in message for name, value in arguments.items())
    assert "one" in message


@pytest.mark.parametrize("given", [{"ratio": 0.9}, {"counts": [300, 200]}])
@pytest.mark.parametrize("merges", [4, "every"])
def test_merges_with_ratio_or_counts(given, merges):
    message = refused(**given, merges=merges)
    assert f"{[*given][0]} says what every block removes" in message and f"merges={merges!r}" in message


@pytest.mark.parametrize("merges", [0, -1, True, False, 2.5, 6.0, "some", "6", [6]])
def test_merges_out_of_range(merges):
    message = refused(keep=144, merges=merges)
    assert f"merges={merges!r}" in message and "a number of merge points from 1, or 'every'" in message


def test_unknown_shape_names_the_choices():
    message = refused(keep=144, shape="stairs")
    assert "'stairs'" in message and all(shape in message for shape in SHAPES)


# Rounds before the projector: as many as needed, not one more.


@pytest.mark.parametrize(
    "keep, steps", [(576, 0), (575, 1), (288, 1), (287, 2), (144, 2), (143, 3), (72, 3), (2, 9), (1, 10)]
)
def test_rounds_are_as_few_as_possible(keep, steps):
    counts = projector_counts(PATCHES, keep)
    assert len(counts) == steps
    if steps:
        check(counts, PATCHES, steps, keep)
    assert projector_counts(PATCHES, keep, all_but_one) == ([keep] if keep < PATCHES else [])


def test_rounds_that_get_stuck_name_the_fewest_possible():
    with pytest.raises(ValueError, match="3 is the fewest possible"):
        projector_counts(PATCHES, 2, quarter)
