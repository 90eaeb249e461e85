"""The table of methods, their options, and what is particular to one of them."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from drawn import NAMES, each, members

from pitome_mllm.methods import METHODS, Reducer, get_method
from pitome_mllm.methods.reducer import check_number
from pitome_mllm.settings import PUBLISHED

# The table of methods.


def test_the_first_methods_are_there():
    first = {"pitome", "pitome-bsm", "pitome-llava", "tome", "random", "pool"}
    assert first <= set(METHODS)


@each(NAMES)
def test_every_method_is_described(name):
    method = METHODS[name]
    assert issubclass(method.reducer, Reducer) and isinstance(get_method(name), method.reducer)
    assert method.summary and "\n" not in method.summary and method.reference
    known = {field.name for field in dataclasses.fields(method.reducer)}
    assert set(method.options) <= known
    assert method.reducer.needs <= {"attention", "grid"}
    assert {*method.settings} <= {*PUBLISHED}
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


@pytest.mark.parametrize("seed", [-1, 2**32, 2**45, 2**70])
def test_any_whole_number_is_a_seed(seed):
    merge = get_method("random", seed=seed).match(torch.ones(2, 30, 2), 20)
    assert ((merge.group == -1).sum(1) == 20).all()


WRONG = [
    *(("random", "seed", value) for value in (1.5, "a", None, True)),
    *(("pitome", "margin", value) for value in ("x", math.nan, math.inf)),
    *(("pitome", "alpha", value) for value in ("x", math.nan, None)),
    *(("pitome", "protect", value) for value in ("x", math.nan, -0.1, 1.5, None)),
]


@pytest.mark.parametrize("name, option, value", WRONG)
def test_an_option_of_the_wrong_kind_is_refused_when_it_is_given(name, option, value):
    with pytest.raises(ValueError, match=option) as caught:
        get_method(name, **{option: value})
    assert str(value) in str(caught.value)


LOOKING = [name for name in METHODS if "attention" in METHODS[name].reducer.needs]


@each([name for name in LOOKING if name != "mctf"])  # which says that it can do without
def test_what_a_method_needs_is_asked_for_by_name(name):
    metric = torch.rand(1, 17, 4)
    with pytest.raises(ValueError, match="needs attention"):
        get_method(name).match(metric, 4, protected=1)
    assert get_method(name).match(metric, 4, protected=1, attention=torch.rand(1, 17)).count == 13


@pytest.mark.parametrize("low,high,said", [(-math.inf, 2, " to 2"), (1, math.inf, " from 1"), (0, 1, " from 0 to 1")])
def test_bounds_that_do_not_exist_are_not_named(low, high, said):
    with pytest.raises(ValueError) as caught:
        check_number("x", math.nan, low, high)
    assert str(caught.value).endswith(f"choose a number{said}")
