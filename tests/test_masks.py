"""Who sees whom in the layers of an LLM: sliding windows and blocks that see both ways, over merged tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from by_hand import Reference, Tokens, frequencies, told
from checks import assert_row, logits
from families import BY_TITLE, QUESTIONS, TWO_PICTURES, Family, llava, pictures
from models import CACHE, text_config

from pitome_mllm import attach
from pitome_mllm.families.geometry import layer_kinds

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


# ---- blocks of tokens that see each other ----------------------------------------------------------------------------


def paligemma(kind: str, **options) -> Family:
    """PaliGemma, 1 or 2, whose prompt sees itself both ways."""
    row = BY_TITLE["PaliGemma"]

    def config():
        made = row.config()
        made.text_config = text_config(kind, head_dim=32, **options)
        made._attn_implementation = "eager" if options else "sdpa"
        return made

    return replace(row, config=config)


BLOCKS = {
    "PaliGemma": paligemma("GemmaConfig"),
    "PaliGemma 2": paligemma("Gemma2Config", layer_types=HALF, sliding_window=NARROW),
    "PaliGemma 2, wide": paligemma("Gemma2Config", layer_types=HALF, sliding_window=WIDE),
}


def blocks_of(title, types):
    """The block of each token of a row, by what its processor says of it; -1 = none."""
    if title.startswith("PaliGemma"):
        return [0 if kind == 0 else -1 for kind in types]
    begins = [kind == 1 and before != 1 for kind, before in zip(types, [0, *types])]
    return [sum(begins[: i + 1]) if kind == 1 else -1 for i, kind in enumerate(types)]


def masks_of_layers(handle):
    """What the first layer of each kind is called with: of each call its mask."""
    kinds, seen = layer_kinds(handle.language.config), {}
    for kind in {*kinds}:
        calls = seen[kind] = []
        layer = handle.language.layers[kinds.index(kind)]
        layer.register_forward_pre_hook(
            lambda module, args, given, calls=calls: calls.append(given["attention_mask"]), with_kwargs=True
        )
    return seen


@pytest.mark.parametrize("calibration", ["distance", "size", "none"])
@pytest.mark.parametrize("title", BLOCKS)
def test_the_masks_of_layers(title, calibration):
    """Of a padded batch with several pictures, and of the steps after it, against loops over positions and types."""
    family, positions = BLOCKS[title], []
    model, inputs = family.build(), family.process(ROWS)
    with attach(model, "pitome", keep=0.25, calibration=calibration) as handle:
        calls = masks_of_layers(handle)
        handle.language.register_forward_pre_hook(
            lambda module, args, given: positions.append(given["position_ids"].expand(2, -1)), with_kwargs=True
        )
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
        layout, sizes, first = handle.stats.layout, [*handle.stats.sizes], 0
    assert [x.shape[1] for x in positions[1:]] == [1, 1, 1]
    for row in range(2):
        real = layout[row] >= 0
        pad, columns = int((~real).sum()), layout[row][real]
        image = inputs["input_ids"][row][columns] == model.config.image_token_id
        pictures = 1 + row
        size = torch.zeros(len(columns) + 3)
        size[:-3][image] = torch.cat(sizes[first : first + pictures]).float()
        first += pictures
        types = inputs["token_type_ids"][row][columns].tolist()
        places = torch.cat([x[row] for x in positions])[pad:].tolist()
        places = list(range(len(places))) if calibration == "none" else places
        blocks = blocks_of(title, types) + [-1] * 3
        for kind, made in calls.items():
            window = handle.language.config.sliding_window if kind == HALF[0] else None
            theta = frequencies(handle.language, kind)
            expected = told(places, size.tolist(), theta, calibration, window, blocks, title.startswith("PaliGemma"))
            end = len(columns)
            for mask, x in zip(made, positions):
                queries = min(x.shape[1], end)
                assert_mask(mask, row, expected[end - queries : end, :end])
                end += 1


def assert_mask(mask, row, expected):
    """The end of a mask (B or 1, 1, T, N), perhaps without keys that none sees, is the expected one; None is causal."""
    queries, keys = expected.shape
    if mask is None:
        assert torch.equal(expected == 0, torch.ones(queries, keys).tril(keys - queries).bool())
        return
    seen = mask.expand(2, -1, -1, -1)[row, 0][-queries:, -keys:]
    assert bool((expected[:, : keys - seen.shape[1]] == -math.inf).all())
    expected = expected[:, keys - seen.shape[1] :]
    hidden = ~seen if seen.dtype == torch.bool else seen == torch.finfo(seen.dtype).min
    assert torch.equal(hidden, expected == -math.inf)
    if seen.dtype != torch.bool:
        torch.testing.assert_close(seen[~hidden], expected[~hidden], check_dtype=False, atol=1e-5, rtol=1e-5)
