"""What people do with models that merge behind their projector, family by family: generate, train, count, take off."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from checks import assert_same_modules, logits, new_ids
from families import NO_PICTURE, QUESTIONS, TWO_PICTURES, pictures
from models import CACHE, build_text_model, since_518
from packed import ID, PACKED
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from pitome_mllm import attach, estimate

FAMILIES = pytest.mark.parametrize("family", PACKED, ids=lambda family: family.title)
IGNORE = -100
LAST = 3  # columns behind the last picture that have labels


@pytest.fixture(scope="module")
def merging():
    """A model of a family with a quarter of its tokens, its handle, and the inputs of one row and of several."""
    made = {}

    def make(family):
        if family.title not in made:
            model = family.build()
            rows = [(TWO_PICTURES, pictures(1, 2)), (QUESTIONS[1], pictures(3)), (NO_PICTURE, [])]
            inputs = family.process(rows[:1]), family.process(rows)
            made[family.title] = model, attach(model, "pitome", keep=0.25), *inputs
        return made[family.title]

    return make


WAYS = {
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "draft": {"assistant_model": build_text_model},
    "chunks": {"prefill_chunk_size": 16},
}


@FAMILIES
def test_ways_to_generate_change_no_answer(family, merging):
    model, _, one, batch = merging(family)
    answer = new_ids(model, one)
    for name, options in WAYS.items():
        options = {key: value() if callable(value) else value for key, value in options.items()}
        if name in family.without:
            with pytest.raises(Exception):
                new_ids(family.build(), one, **options)
            continue
        assert new_ids(model, one, **options) == answer, name
    beams = new_ids(model, batch, num_beams=2)
    assert beams == new_ids(model, batch, num_beams=2, use_cache=False)
    assert beams[0] == new_ids(model, one, num_beams=2)[0]
