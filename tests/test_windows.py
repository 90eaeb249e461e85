"""LLMs whose layers see through a sliding window: which merged tokens are in it, in prefill, steps and later turns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from by_hand import Reference, Tokens
from checks import assert_row, logits
from families import QUESTIONS, TWO_PICTURES, Family, llava, pictures
from models import CACHE

from pitome_mllm import attach

KEPT = 36  # of 144
NARROW, WIDE = 30, 100  # fewer places than a picture has left; more, and fewer positions than it had
HALF = ["sliding_attention", "full_attention"]
THETAS = {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in zip(HALF, (100.0, 10000.0))}


def family(kind: str, window: int, attention: str = "sdpa", **options) -> Family:
    """LLaVA-1.5 with an LLM of a kind, and with a window."""
    row = llava(kind, kind, sliding_window=window, **options)

    def config():
        made = row.config()
        made._attn_implementation = attention
        return made

    return replace(row, config=config)


LLMS = {
    "MistralConfig": {},
    "Qwen2Config": {"use_sliding_window": True, "layer_types": HALF},
    "Gemma2Config": {"layer_types": HALF, "head_dim": 32, "attention": "eager"},
    "Gemma3TextConfig": {"layer_types": HALF, "head_dim": 32, "rope_parameters": THETAS},
}
# In double precision eager masks of transformers leave NaN where a row is padded, so Gemma 2 is always told something.
CASES = [
    (kind, told) for kind in LLMS for told in ("distance", "size", "none") if (kind, told) != ("Gemma2Config", "none")
]
ROWS = [(QUESTIONS[0], pictures(0)), (TWO_PICTURES, pictures(1, 2))]


def reference(model, plain, inputs, handle):
    """After a call of ``model``: groups and features are its own."""
    with torch.no_grad():
        features = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    tokens = Tokens(torch.stack(list(features)), handle.stats.groups, handle.stats.sizes)
    return Reference(plain, inputs, tokens, handle.plan.calibration)


@pytest.mark.parametrize("window", [NARROW, WIDE])
@pytest.mark.parametrize("kind,calibration", CASES)
def test_a_window_counts_positions_in_prefill_steps_and_turns(kind, calibration, window):
    row = family(kind, window, **LLMS[kind])
    model, plain, inputs = row.build(), row.build(), row.process(ROWS)
    with attach(model, "pitome", published=True, keep=KEPT, calibration=calibration) as handle:
        seen = logits(model, inputs)
        expected = reference(model, plain, inputs, handle)
        for row in range(2):
            assert_row(seen[row], expected.logits(row))
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        said = out.sequences[:, inputs["input_ids"].shape[1] :]
        assert said.tolist() == [expected.greedy(row, 4) for row in range(2)]
        ids = torch.cat([out.sequences, torch.tensor([[7, 8, 9], [10, 11, 12]])], 1)
        more = torch.ones(2, 7, dtype=torch.long)
        mask = torch.cat([inputs["attention_mask"], more], 1)
        again = model.generate(
            input_ids=ids, attention_mask=mask, **{CACHE: out[CACHE]}, max_new_tokens=4, do_sample=False
        )
        for row in range(2):
            text = ids[row, inputs["input_ids"].shape[1] :]
            assert again[row, ids.shape[1] :].tolist() == expected.greedy(row, 4, text)
