"""Who sees whom in the layers of an LLM: sliding windows and blocks that see both ways, over merged tokens."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from by_hand import Reference, Tokens, frequencies, told
from checks import assert_row, logits, new_ids
from families import BY_TITLE, QUESTIONS, TWO_PICTURES, Family, llava, pictures
from models import BEFORE_518, CACHE, since_518, text_config
from packed import PACKED

from pitome_mllm import attach
from pitome_mllm.families.geometry import layer_kinds

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's processor
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
CASES = (
    [(kind, "distance") for kind in LLMS]
    + [(kind, "none") for kind in LLMS if "3" in kind]
    + [("MistralConfig", told) for told in ("size", "none")]
)
CACHES = [
    {"cache_implementation": "static"},
    {"prefill_chunk_size": 20},
    {"num_beams": 3},
    {"prompt_lookup_num_tokens": 2},
]
ASKED = [(QUESTIONS[0], pictures(0)), (TWO_PICTURES, pictures(1, 2))]


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
    model, plain, inputs = row.build(), row.build(), row.process(ASKED)
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


@since_518
@pytest.mark.parametrize("options", CACHES, ids=str)
@pytest.mark.parametrize("kind", ["MistralConfig", "Gemma3TextConfig"])
def test_caches_of_layers_with_a_window_do_not_change_the_answer(kind, options):
    """They forget what is out of the window, each in its own way."""
    row = family(kind, NARROW, **LLMS[kind])
    model, inputs = row.build(), row.process(ASKED[:1] if "prompt_lookup_num_tokens" in options else ASKED)
    beams = {"num_beams": options.get("num_beams", 1)}
    with attach(model, "pitome", published=True, keep=KEPT, calibration="distance"):
        assert new_ids(model, inputs, **options) == new_ids(model, inputs, use_cache=False, **beams)


TURNS = {kind: family(kind, NARROW, **LLMS[kind]) for kind in ("MistralConfig", "Gemma3TextConfig")}


AGREES = pytest.mark.skipif(BEFORE_518, reason="before 5.18 the plain Gemma 3 disagrees, too")
GEMMAS = [pytest.param(row, marks=AGREES) if row.title == "Gemma 3" else row for row in PACKED if "Gemma" in row.title]


@pytest.mark.parametrize("calibration", ["distance", "none"])
@pytest.mark.parametrize("row", [*TURNS.values(), *GEMMAS], ids=lambda row: row.title)
def test_a_picture_in_a_later_turn(row, calibration):
    """On a cache that has forgotten what is out of the window: as the whole conversation anew."""
    model, (one, other) = row.build(), (dict(row.process([asked])) for asked in (ASKED[0], (QUESTIONS[1], pictures(3))))
    pixels = [name for name in one if "image" in name or "pixel" in name]
    with attach(model, keep=0.25, calibration=calibration):
        first = model.generate(**one, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        answer = first.sequences[:, one["input_ids"].shape[1] :]
        ids = torch.cat([first.sequences, other["input_ids"][:, 1:]], 1)
        both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name in (name for name in one if name.endswith("token_type_ids")):
            both[name] = torch.cat([one[name], torch.zeros_like(answer), other[name][:, 1:]], 1)
        on_cache = {**both, **{name: other[name] for name in pixels}, CACHE: first[CACHE]}
        anew = {**both, **{name: torch.cat([one[name], other[name]]) for name in pixels}}
        assert new_ids(model, on_cache, 4) == new_ids(model, anew, 4)


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


def gemma(title: str, window: int) -> Family:
    """Gemma 3 or 4, of which the tokens of a picture see each other both ways."""
    row = next(row for row in PACKED if row.title == title)

    def config():
        made = row.config()
        made.text_config.sliding_window = window
        return made

    return replace(row, config=config)


BLOCKS = {
    "PaliGemma": paligemma("GemmaConfig"),
    "PaliGemma 2": paligemma("Gemma2Config", layer_types=HALF, sliding_window=NARROW),
    "PaliGemma 2, wide": paligemma("Gemma2Config", layer_types=HALF, sliding_window=WIDE),
    "Gemma 3, a window of less than a picture": gemma("Gemma 3", 10),
    "Gemma 3": gemma("Gemma 3", 24),
    "Gemma 4": gemma("Gemma 4", 24),
}


def blocks_of(title, kind, types):
    """The block of each token of a row in layers of a kind, by what its processor says of the token; -1 = none."""
    if title.startswith("PaliGemma"):
        return [0 if one == 0 else -1 for one in types]
    begins = [one == 1 and before != 1 for one, before in zip(types, [0, *types])]
    sees = title != "Gemma 4" or kind == HALF[0]  # of Gemma 4's layers those with a window
    return [sum(begins[: i + 1]) if sees and one == 1 else -1 for i, one in enumerate(types)]


def calls_of(handle):
    """What is noted from now on: the position ids of every call of the LLM, and the masks of its layers by kind."""
    kinds, positions, masks = layer_kinds(handle.language.config), [], {}
    handle.language.register_forward_pre_hook(
        lambda module, args, given: positions.append(given["position_ids"]), with_kwargs=True
    )
    for kind in {*kinds}:
        seen = masks[kind] = []
        handle.language.layers[kinds.index(kind)].register_forward_pre_hook(
            lambda module, args, given, seen=seen: seen.append(given["attention_mask"]), with_kwargs=True
        )
    return positions, masks


@pytest.mark.parametrize("calibration", ["distance", "size", "none"])
@pytest.mark.parametrize("title", BLOCKS)
def test_the_masks_of_layers(title, calibration):
    """Of a padded batch with several pictures, and of the steps after it, against loops over positions and types."""
    family = BLOCKS[title]
    model, inputs = family.build(), family.process(ASKED)
    if title.startswith("PaliGemma"):
        inputs["token_type_ids"][:, -3:] = 1  # as an answer to learn
    with attach(model, "pitome", keep=0.25, calibration=calibration) as handle:
        positions, masks = calls_of(handle)
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
        layout, sizes = (
            handle.stats.layout,
            [torch.cat([*part]) for part in (handle.stats.sizes[:1], handle.stats.sizes[1:])],
        )
    assert [x.shape[1] for x in positions[1:]] == [1, 1, 1]
    for row, kind in itertools.product(range(2), masks):
        columns = layout[row][layout[row] >= 0]
        size = torch.zeros(len(columns) + 3)
        size[:-3][inputs["input_ids"][row][columns] == model.config.image_token_id] = sizes[row]
        types = inputs[next(name for name in inputs if name.endswith("token_type_ids"))][row][columns].tolist()
        places = torch.cat([x.expand(2, -1)[row] for x in positions])[-len(size) :].tolist()
        expected = told(
            list(range(len(size))) if calibration == "none" else places,
            size.tolist(),
            frequencies(handle.language, kind),
            calibration,
            handle.language.config.sliding_window if kind == HALF[0] else None,
            blocks_of(title, kind, types) + [-1] * 3,
            across=title.startswith("PaliGemma"),
        )
        for end, mask in enumerate(masks[kind], len(columns)):
            assert_mask(mask, row, expected[0 if end == len(columns) else end - 1 : end, :end])


def of_one_row(name, values):
    return torch.cat(values, 1 if name in ("input_ids", "token_type_ids", "mm_token_type_ids") else 0)


@torch.no_grad()
@pytest.mark.parametrize("title", BLOCKS)
def test_gaps_between_positions_are_no_borders_of_samples(title):
    """Models without a mask and a cache read borders out of position ids; those that restart are borders."""
    family = BLOCKS[title]
    model, samples = family.build(), [dict(family.process([asked])) for asked in ASKED]
    bare = [{name: x for name, x in sample.items() if name not in ("attention_mask", "labels")} for sample in samples]
    packed = {name: of_one_row(name, [sample[name] for sample in bare]) for name in bare[0]}
    packed["position_ids"] = torch.cat([torch.arange(sample["input_ids"].shape[1]) for sample in bare])[None]
    with attach(model, "pitome", keep=0.25, calibration="distance"):
        expected = [logits(model, sample)[0] for sample in samples]
        for sample, one in zip(bare, expected):
            torch.testing.assert_close(logits(model, sample, use_cache=False)[0], one, atol=1e-3, rtol=1e-3)
        seen = logits(model, packed, use_cache=False)[0]
    torch.testing.assert_close(seen, torch.cat(expected), atol=1e-3, rtol=1e-3)


def test_recurrent_layers_are_told_of_padding_only():
    """Qwen3.5's have no mask of queries and keys; the others of its layers are told what there is to tell."""
    family = next(row for row in PACKED if row.title == "Qwen3.5")
    model, inputs = family.build(), family.process(ASKED)
    with attach(model, keep=0.25) as handle:
        assert handle.plan.calibration == "distance"
        _, masks = calls_of(handle)
        logits(model, inputs)
        layout = handle.stats.layout
    assert torch.equal(masks["linear_attention"][0] != 0, layout >= 0)
    assert masks["full_attention"][0].shape == (2, 1, *2 * layout.shape[1:])


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
