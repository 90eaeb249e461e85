"""bitsandbytes 8-bit and 4-bit models merge and generate like any other."""

from __future__ import annotations

import copy

import pytest
import torch
from checks import assert_same_modules, logits, new_ids, reference
from models import PATCHES, build
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

from pitome_mllm import attach
from pitome_mllm.attach import Attachment

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*MatMul8bitLt.*"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
]
SETTINGS = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
}
KEY = {"int8": "Linear8bitLt", "nf4": "Linear4bit"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    build().save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=[(b, d) for b in SETTINGS for d in (torch.float32, torch.bfloat16)], ids=str)
def quantised(request, folder):
    """(model, name of its precision, dtype of the rest); every test must remove what it attaches."""
    name, dtype = request.param
    config = BitsAndBytesConfig(**SETTINGS[name])
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, quantization_config=config, device_map={"": "cpu"}, dtype=dtype
    )
    return model.eval(), name, dtype


def cast(inputs, dtype):
    return {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}


def test_the_model_is_quantised(quantised):
    model, name, _ = quantised
    assert type(model.model.vision_tower.encoder.layers[0].self_attn.k_proj).__name__ == KEY[name]


@pytest.mark.parametrize("where", ["tower", "projector", "both"])
def test_merges_and_restores(quantised, one, pair, where):
    model, _, dtype = quantised
    one, pair = cast(one, dtype), cast(pair, dtype)
    plain = logits(model, one), new_ids(model, one)
    with attach(model, "pitome", published=True, keep=144, where=where) as handle:
        seen = logits(model, pair)
        assert seen.isfinite().all() and seen.shape[1] == pair["input_ids"].shape[1] - PATCHES + 144
        assert (handle.stats.images, handle.stats.tokens_after) == (2, 144)
        assert torch.equal(handle.stats.sizes.sum(1), torch.full((2,), float(PATCHES)))
        assert len(new_ids(model, one)[0]) == 6
        assert handle.stats.counts == handle.plan.counts
        assert new_ids(model, one, num_beams=2)[0]
    assert torch.equal(logits(model, one), plain[0])
    assert new_ids(model, one) == plain[1]


def test_keeping_all_is_bit_identical(quantised, one):
    model, _, dtype = quantised
    one = cast(one, dtype)
    plain = logits(model, one)
    with attach(model, "pitome", published=True, keep=PATCHES):
        assert torch.equal(logits(model, one), plain)


def test_merges_as_defined(quantised, one):
    """The definition, run on the same quantised layers. int8 rounds activations too, so its decisions are near-ties."""
    model, name, dtype = quantised
    if (name, dtype) != ("nf4", torch.float32):
        return
    with attach(model, "pitome", published=True, keep=144) as handle:
        seen, groups, counts = logits(model, one), handle.stats.groups, handle.plan.counts
    expected = reference(model, one, counts)
    assert torch.equal(groups, expected.tokens.groups)
    torch.testing.assert_close(seen[0], expected.logits(), atol=1e-4, rtol=1e-4)


def test_a_deepcopy_merges_on_its_own(quantised, one):
    model, _, dtype = quantised
    one = cast(one, dtype)
    with attach(model, "pitome", published=True, keep=144):
        expected = logits(model, one)
        twin = copy.deepcopy(model)
    handle = Attachment.of(twin)
    assert torch.equal(logits(twin, one), expected) and handle.stats.tokens_after == 144
    handle.remove()
    assert torch.equal(logits(twin, one), logits(model, one))
    assert_same_modules(twin, copy.deepcopy(model))
