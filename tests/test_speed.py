"""What must stay cheap: energies in bounded memory, attaching, decoding."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from checks import Alive, Operations
from models import CACHE, build

from pitome_mllm import attach, get_method
from pitome_mllm.hooks.call import Call
from pitome_mllm.methods import pitome
from pitome_mllm.methods.pitome import BLOCK

SHORT = Call({}, torch.zeros(1, 0, dtype=torch.bool))  # a prompt that generate() knows to be short
OPTIONS = [{}, {"energy": "elu"}, {"alpha": 0.0, "protect": 0.5}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("pairs", [1, 7 * 97 * 2, 96 * 96 * 2])  # a row at a time, several with a rest, all at once
def test_energies_in_blocks_are_those_of_all_at_once(options, pairs):
    metric = torch.randn(2, 97, 8, generator=torch.Generator().manual_seed(3))
    reducer = get_method("pitome", **options)
    with patch.dict(BLOCK, cpu=2**62):
        whole = reducer.match(metric, 20, protected=1, depth=0.4)
    with patch.dict(BLOCK, cpu=pairs):
        blocks = reducer.match(metric, 20, protected=1, depth=0.4)
    torch.testing.assert_close(blocks.energy, whole.energy, rtol=0, atol=1e-6)
    assert torch.equal(blocks.group, whole.group)


def test_of_two_tokens_in_different_blocks_of_rows_the_similarity_is_worked_out_once():
    unit, seen = torch.eye(5)[None].repeat(2, 80, 1), []

    def value(similarity):
        seen.append(similarity.numel())
        return similarity * 2

    with patch.dict(BLOCK, cpu=40 * 400):
        means = pitome.pair_means(unit, value)
    torch.testing.assert_close(means, (2 * unit @ unit.mT).mean(-1))
    assert sum(seen) < 0.6 * 2 * 400**2


@pytest.mark.parametrize("energy", ["paper", "elu"])
def test_a_similarity_of_exactly_the_margin_counts_as_above_it(energy):
    """f jumps there: half of the pairs are alike to exactly 1/2, which float32 holds."""
    metric = torch.tensor([[[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5]]])
    reducer = get_method("pitome", energy=energy, margin=0.5, alpha=0.0)
    assert reducer.energy_of(metric, 0.0).tolist() == [[{"paper": 0.75, "elu": 0.25}[energy]] * 2]


def test_blocks_bound_memory():
    """A matrix of all pairs is never alive, let alone several."""
    generator = torch.Generator().manual_seed(0)
    keys, x = (torch.randn(1, 1500, width, generator=generator) for width in (64, 1024))

    def peak() -> int:
        with Alive() as alive:
            get_method("pitome").match(keys, 150, depth=0.5).reduce(x)
        return alive.most

    assert peak() < 2 * x.nbytes + 8e6  # what it gives, and some of what it takes
    with patch.dict(BLOCK, cpu=2**62):
        assert peak() > 2 * 1500**2 * 4


@pytest.fixture(scope="module")
def deep():
    """A model with as many tower blocks as CLIP-L."""
    return build(layers=24)


def test_attaching_updating_and_removing_touch_no_tensor(deep):
    """So that they take some milliseconds, whatever the model."""
    with Operations() as operations:
        handle = attach(deep, keep=144)
        handle.update(keep=72, method="tome")
        handle.remove()
    assert operations.seen == []


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"method": "pitome", "keep": 144}, {"keep": 144}], ids=str)
def test_a_decoding_step_of_generate_can_be_compiled(one, settings):
    """Within generate(), which knows that its prompt is short; hooks run between its graphs."""
    model = build(layers=3)
    model(**one)
    torch.compiler.reset()
    with attach(model, **settings) as handle:
        out = model(**one, use_cache=True)
        past, token = out[CACHE], out.logits[:, -1:].argmax(-1)
        mask = torch.ones(1, past.get_seq_length() + 1, dtype=torch.long)

        def step(token, past, mask):
            return model(input_ids=token, **{CACHE: past}, attention_mask=mask, use_cache=True).logits

        with handle.choosing(handle.plan, SHORT):
            expected = step(token, past, mask)
            past.crop(-1)
            compiled = torch.compile(step, backend="eager")
            torch.testing.assert_close(compiled(token, past, mask), expected)
    torch.compiler.reset()
