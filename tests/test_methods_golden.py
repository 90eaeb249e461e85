"""Methods against what others computed: the recorded reference vectors, and the papers' formulas written out slowly.

`data/README.md` describes the vectors. The slow versions below work in float64 on one row at a time with Python loops
and sorts; they share no code with the package.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pitome_mllm.methods import get_method

DATA = Path(__file__).parent / "data"
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}

# Recorded method -> (our name, options from the recorded parameters). A further method is one further line.
RECORDED = {
    "pitome": ("pitome", lambda case: {"margin": case["margin"], "alpha": case["alpha"], "energy": "elu"}),
    "pitome_bsm": ("pitome-bsm", lambda case: {"margin": case["margin"], "alpha": case["alpha"], "energy": "elu"}),
    "tome": ("tome", lambda case: {}),
    "tofu": ("tofu", lambda case: {"reference": "target"}),
    "mctf": (
        "mctf",
        lambda case: {"tau_sim": case["tau_sim"], "tau_size": case["tau_size"], "bidirectional": case["bidirection"]},
    ),
}
CASES = {
    name: case for name, case in json.loads((DATA / "golden.json").read_text()).items() if case["method"] in RECORDED
}


TOFU = [name for name, case in CASES.items() if case["method"] == "tofu"]  # recorded with its own combination only
# What is merged from both sides was recorded as a mean of means.
PLAIN_MEANS = [name for name, case in CASES.items() if name not in TOFU and not case.get("bidirection")]


@cache
def tensors() -> dict[str, Tensor]:
    return load_file(DATA / "golden.safetensors")


def smallest_index(group: Tensor) -> Tensor:
    """For each token the smallest index in its group: (B, N) -> (B, N), whatever the numbering of the groups."""
    return (group[:, :, None] == group[:, None, :]).int().argmax(-1)


def test_all_recorded_cases_are_there():
    per_method = {method: sum(case["method"] == method for case in CASES.values()) for method in RECORDED}
    assert per_method == {"pitome": 32, "pitome_bsm": 8, "tome": 8, "tofu": 8, "mctf": 16}


@pytest.mark.parametrize("name", CASES)
def test_same_partition_means_and_sizes(name):
    case = CASES[name]
    method, options = RECORDED[case["method"]]
    x, metric, size = (tensors()[f"{case['input']}/{key}"] for key in ("x", "metric", "size"))
    protected = int(case["class_token"])
    merge = get_method(method, **options(case)).match(metric, case["N"] - case["K"], size=size, protected=protected)
    assert merge.count == case["K"]
    assert torch.equal(smallest_index(merge.group), tensors()[f"{name}/group_of"].long())
    found = {}
    if name in TOFU:
        found["norm_preserving"], _ = merge.reduce(x)
    else:
        found["wavg"], found["wavg_size"] = merge.reduce(x, size)
    if name in PLAIN_MEANS:
        found["mean"], _ = merge.reduce(x, torch.ones_like(size))
    for what, values in found.items():
        torch.testing.assert_close(values, tensors()[f"{name}/{what}"], **TOLERANCE)


# The formulas, slowly.


def cosines(metric: Tensor) -> Tensor:
    """(N, N) cosine similarities in float64 of one row's metric (N, C)."""
    unit = metric.double() / metric.double().norm(dim=-1, keepdim=True)
    return unit @ unit.T


def slow_energy(metric: Tensor, protected: int, margin: float, alpha: float, energy: str) -> dict[int, float]:
    """Energy of each unprotected token of one row, by its index."""
    cos = cosines(metric).tolist()
    others = range(protected, len(metric))

    def f(c: float) -> float:
        above = c if energy == "paper" else c - margin
        return above if c >= margin else alpha * (math.exp(c - margin) - 1)

    return {i: sum(f(cos[i][j]) for j in others) / len(others) for i in others}


def join(metric: Tensor, sources: list[int], targets: list[int], r: int) -> list[int]:
    """Smallest index of every token's group after the ``r`` sources nearest to their best target joined it."""
    cos = cosines(metric).tolist()
    best = {a: max(targets, key=lambda b: cos[a][b]) for a in sources} if r else {}
    chosen = sorted(best, key=lambda a: -cos[a][best[a]])[:r]
    root = [best[i] if i in chosen else i for i in range(len(metric))]
    return [root.index(value) for value in root]


def slow_pitome(metric: Tensor, r: int, protected: int, **energy) -> list[int]:
    value = slow_energy(metric, protected, **energy)
    order = sorted(value, key=lambda i: -value[i])[: 2 * r]
    return join(metric, order[0::2], order[1::2], r)


def slow_pitome_bsm(metric: Tensor, r: int, protected: int, **energy) -> list[int]:
    value = slow_energy(metric, protected, **energy)
    order = sorted(value, key=lambda i: -value[i])
    return join(metric, order[0::2], order[1::2], r)


def slow_tome(metric: Tensor, r: int, protected: int) -> list[int]:
    tokens = range(len(metric))
    return join(metric, [i for i in tokens[0::2] if i >= protected], [i for i in tokens[1::2] if i >= protected], r)


def picture(batch: int, tokens: int, seed: int) -> Tensor:
    """A metric (B, N, 8) with a few loose clusters, as the keys of a picture have them."""
    random = torch.Generator().manual_seed(seed)
    centre = torch.randn(batch, 4, 8, generator=random)
    member = torch.randint(4, (batch, tokens, 1), generator=random).expand(-1, -1, 8)
    return centre.gather(1, member) + 0.5 * torch.randn(batch, tokens, 8, generator=random)


SHAPES = [(n, r, protected) for n in (2, 3, 8, 23, 40) for protected in (0, 1) for r in sorted({0, 1, n // 4, n // 2})]


@pytest.mark.parametrize("energy", ["paper", "elu"])
@pytest.mark.parametrize("margin, alpha", [(0.9, 1.0), (0.45, 0.5), (0.0, 0.25), (-0.2, 1.0)])
@pytest.mark.parametrize("name, slow", [("pitome", slow_pitome), ("pitome-bsm", slow_pitome_bsm)])
def test_pitome_follows_its_formula(name, slow, margin, alpha, energy):
    for seed, (n, r, protected) in enumerate(SHAPES):
        metric = picture(2, n + protected, seed)
        merge = get_method(name, margin=margin, alpha=alpha, energy=energy).match(metric, r, protected=protected)
        expected = [slow(row, r, protected, margin=margin, alpha=alpha, energy=energy) for row in metric]
        assert smallest_index(merge.group).tolist() == expected, f"n={n} r={r} protected={protected}"


def test_tome_follows_its_formula():
    for seed, (n, r, protected) in enumerate(SHAPES):
        metric = picture(2, n + protected, seed)
        merge = get_method("tome").match(metric, r, protected=protected)
        expected = [slow_tome(row, r, protected) for row in metric]
        assert smallest_index(merge.group).tolist() == expected, f"n={n} r={r} protected={protected}"


@pytest.mark.parametrize("energy", ["paper", "elu"])
@pytest.mark.parametrize("depth", [0.0, 5 / 23, 22 / 23])
def test_energy_with_the_margin_that_falls_with_depth(depth, energy):
    metric = picture(2, 30, seed=0)
    merge = get_method("pitome", energy=energy).match(metric, 7, protected=1, depth=depth)
    assert merge.energy.dtype == torch.float32
    for row, value in zip(metric, merge.energy, strict=True):
        slow = slow_energy(row, 1, margin=0.9 - 0.9 * depth, alpha=1.0, energy=energy)
        torch.testing.assert_close(value, torch.tensor(list(slow.values())), **TOLERANCE)


def test_the_two_energies_rank_differently():
    """Otherwise the tests above could not tell the paper from the authors' code."""
    metric = picture(4, 40, seed=1)
    groups = [get_method("pitome", margin=0.45, energy=energy).match(metric, 10).group for energy in ("paper", "elu")]
    assert not torch.equal(*groups)


def test_pitome_is_the_papers():
    metric = picture(2, 40, seed=2)
    default = get_method("pitome").match(metric, 9, protected=1, depth=0.25)
    paper = get_method("pitome", margin=0.9 - 0.9 * 0.25, alpha=1.0, energy="paper", protect=1)
    assert torch.equal(default.group, paper.match(metric, 9, protected=1).group)


def test_pitome_llava_is_tome_and_from_block_13_on_pitome():
    """What the authors' LLaVA code does in each of its 23 merging blocks."""
    for block in range(23):
        metric = picture(2, 41, seed=block)
        merge = get_method("pitome-llava").match(metric, 10, protected=1, depth=block / 23)
        if block < 13:
            expected = [slow_tome(row, 10, 1) for row in metric]
        else:
            energy = {"margin": 0.9 - 0.9 * block / 23, "alpha": 1.0, "energy": "elu"}
            expected = [slow_pitome(row, 10, 1, **energy) for row in metric]
        assert smallest_index(merge.group).tolist() == expected, block


@pytest.mark.parametrize("block", [2, 15])
def test_the_order_in_which_pitome_llava_leaves_its_tokens(block):
    """Class token first; then what is left of A by position (ToMe), or the protected by energy (PiToMe); then B."""
    metric, r, n = picture(2, 41, seed=block), 10, 40
    merge = get_method("pitome-llava").match(metric, r, protected=1, depth=block / 23).in_source_order()
    place = torch.arange(41.0)[None, :, None].expand(2, -1, 1)
    for row, number, group in zip(metric, merge.group.tolist(), smallest_index(merge.group).tolist(), strict=True):
        if block < 13:
            alone = [i for i in range(2, 41, 2) if group.count(group[i]) == 1]
            tail = list(range(1, 41, 2))
        else:
            value = slow_energy(row, 1, margin=0.9 - 0.9 * block / 23, alpha=1.0, energy="elu")
            order = sorted(value, key=lambda i: -value[i])
            alone, tail = order[2 * r :], order[1 : 2 * r : 2]
        expected = [group[i] for i in [0, *alone, *tail]]
        assert len(expected) == n + 1 - r
        assert [group[number.index(k)] for k in range(merge.count)] == expected
    means, _ = merge.reduce(place)
    for k in range(merge.count):
        inside = (merge.group == k).float()
        torch.testing.assert_close(means[:, k, 0], (inside * place[..., 0]).sum(1) / inside.sum(1))
