"""What merged features of a family must be, written out from the definition: feature layers, norm, positions."""

from __future__ import annotations

import itertools

import pytest
import torch
from by_hand import states
from checks import positions_of
from families import BY_TITLE, FEATURE_LAYERS, PATCHES, QUESTIONS, TWO_PICTURES, pictures
from packed import PACKED

from pitome_mllm import attach, get_method

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
CLOSE = dict(atol=1e-5, rtol=1e-5)


@torch.no_grad()
def features(model, inputs):
    return model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output


@torch.no_grad()
def test_earlier_feature_layers_go_through_the_later_merges():
    family = BY_TITLE["VipLLaVA"]
    model, plain = family.build(), family.build()
    inputs = family.process([(QUESTIONS[0], pictures(0)), (QUESTIONS[1], pictures(1))])
    with attach(model, "pitome", published=True, keep=36) as handle:
        seen = features(model, inputs)
    found = states(plain.model.vision_tower, inputs["pixel_values"], handle.plan.counts, get_method("pitome"), 1)
    assert list(getattr(model.config, FEATURE_LAYERS)) == [-2, -3, -5, 1] and len(handle.plan.counts) == 5
    side_by_side = torch.cat([found[blocks][:, 1:] for blocks in (5, 4, 2, 1)], -1)
    assert side_by_side.shape == (2, 36, 4 * 64)
    torch.testing.assert_close(seen, plain.model.multi_modal_projector(side_by_side), **CLOSE)


@torch.no_grad()
def test_several_feature_layers_merge_alike_before_the_projector():
    family = BY_TITLE["VipLLaVA"]
    model, plain = family.build(), family.build()
    inputs = family.process([(QUESTIONS[0], pictures(0))])
    with attach(model, "tome", published=True, keep=72, where="projector", metric="hidden"):
        seen = features(model, inputs)
    output = plain.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    x = torch.cat([output.hidden_states[layer] for layer in (-2, -3, -5, 1)], -1)
    merged = get_method("tome").match(x, 72, protected=1, depth=1.0).reduce(x)[0]
    torch.testing.assert_close(seen, plain.model.multi_modal_projector(merged[:, 1:]), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("where", ["tower", "projector"])
@pytest.mark.parametrize("title", ["PaliGemma", "DeepSeek-VL"])
def test_a_projector_that_reads_the_normed_output(title, where):
    family = BY_TITLE[title]
    model, plain = family.build(), family.build()
    inputs = family.process([(QUESTIONS[0], pictures(0)), (QUESTIONS[1], pictures(1))])
    with attach(
        model, "pitome", published=True, keep=72, where=where, metric="keys" if where == "tower" else "hidden"
    ) as handle:
        seen = features(model, inputs)
    tower, projector = map(plain.get_submodule, (handle.family.tower, handle.family.projector))
    reducer = get_method("pitome")
    x = states(tower, inputs["pixel_values"], handle.plan.counts, reducer, 0)[6]
    x = tower.post_layernorm(x)
    if where == "projector":
        x = reducer.match(x, PATCHES - 72, depth=1.0).reduce(x)[0]
    torch.testing.assert_close(seen, projector(x), **CLOSE)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_positions_that_count_from_one(call):
    """PaliGemma's first token has position 1; a merged token has that of its median patch."""
    family = BY_TITLE["PaliGemma"]
    model, inputs = family.build(), family.process([(QUESTIONS[0], pictures(0))])
    handle = attach(model, "pitome", published=True, keep=36, calibration="distance")
    seen = positions_of(model, inputs, call)
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    expected = torch.arange(1, inputs["input_ids"].shape[1] + 1)
    merged = image[0] + handle.stats.median[0]
    kept = torch.cat([torch.arange(image[0]), merged, torch.arange(image[-1] + 1, len(expected))])
    assert torch.equal(seen[0][0], expected[kept])


def of_each(mask):
    """A mask where there is one for every kind of layer."""
    return next(iter(mask.values())) if isinstance(mask, dict) else mask


@pytest.mark.parametrize("title", ["PaliGemma", "LLaVA-NeXT (1.6)", "LLaVA-OneVision", "SmolVLM", "DeepSeek-VL"])
def test_the_mask_tells_of_sizes_and_distances(title):
    """Against a loop over queries and keys; only a PaliGemma's prompt sees both ways."""
    family, seen = BY_TITLE[title], []
    model, inputs = family.build(), family.process([(QUESTIONS[0], pictures(0))])
    handle = attach(model, "pitome", keep=0.25, calibration="distance")
    handle.language.register_forward_pre_hook(lambda *given: seen.append(given[2]), with_kwargs=True)
    with torch.no_grad():
        model(**inputs, use_cache=False)
    (given,) = seen
    places, mask = given["position_ids"][0].tolist(), of_each(given["attention_mask"])[0, 0]
    ids = inputs["input_ids"][0][handle.stats.layout[0]]
    size = torch.ones(len(ids), dtype=torch.float64)
    size[ids == model.config.image_token_id] = torch.cat([*handle.stats.sizes]).double()
    first = int((ids == model.config.image_token_id).nonzero()[0])
    theta = handle.language.rotary_emb.inv_freq.double()
    for m, n in itertools.product(range(len(ids)), repeat=2):
        if title != "PaliGemma" and n > m:
            assert mask[m, n] == torch.finfo(mask.dtype).min
            continue
        told = title == "PaliGemma" or m >= first
        near = (abs(places[m] - places[n]) * theta).cos().mean() if told else 1.0
        assert mask[m, n] == pytest.approx(float((size[n] * (2 - near)).log()), abs=1e-5)


def calls_of(language):
    """The keyword arguments of every call of an LLM."""
    seen = []
    language.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    return seen


def positions_by_hand(ids, grids, placeholder):
    """Time, row and column of every token of a prompt: text counts on in all three from the largest so far."""
    places, at, grids = [], 0, iter(grids)
    while len(places) < len(ids):
        if ids[len(places)] != placeholder:
            places.append((at, at, at))
            at += 1
            continue
        _, rows, columns = (size // 2 for size in next(grids))  # a token is 2 x 2 patches
        places += [(at, at + row, at + column) for row in range(rows) for column in range(columns)]
        at += max(rows, columns)
    return places, at


def compact_by_hand(ids, grids, placeholder, kept):
    """As `positions_by_hand`, where the tokens that a picture keeps fill the rows of a smaller grid of its shape."""
    places, at, column, pictures = [], 0, 0, iter(zip(grids, kept, strict=True))
    while column < len(ids):
        if ids[column] != placeholder:
            places.append((at, at, at))
            at, column = at + 1, column + 1
            continue
        (_, rows, columns), count = next(pictures)
        across = max(1, min(round((count * columns / rows) ** 0.5), count))
        places += [(at, at + token // across, at + token % across) for token in range(count)]
        at += max(-(-count // across), across)
        column += rows * columns // 4
    return places, at


def medians_by_hand(places, ids, placeholder, groups):
    """``places`` of a prompt's tokens with the lower median of every group, axis by axis, for a picture's."""
    told, column = [], 0
    for one in groups:
        first = column + ids[column:].index(placeholder)
        told += places[column:first]
        for token in range(int(one.max()) + 1):
            members = [places[first + i] for i, group in enumerate(one.tolist()) if group == token]
            told.append(tuple(sorted(axis)[(len(members) - 1) // 2] for axis in zip(*members, strict=True)))
        column = first + len(one)
    return told + places[column:]


GRIDS = [family for family in PACKED if family.mark != "<image>"]  # of pictures with grids of their own: M-RoPE


@pytest.mark.parametrize("family", GRIDS, ids=lambda family: family.title)
@pytest.mark.parametrize("calibration", ["size", "none"])
def test_positions_of_three_axes(family, calibration):
    """Time, row and column: those of the median of a group, or numbered anew; and what is written counts on."""
    model, inputs = family.build(), family.process([(TWO_PICTURES, pictures(1, 2))])
    prompt = inputs["input_ids"][0].tolist(), inputs["image_grid_thw"].tolist(), family.placeholder
    handle = attach(model, "pitome", keep=0.25, calibration=calibration)
    seen = calls_of(model.model.language_model)
    model.generate(**inputs, max_new_tokens=3, do_sample=False)
    if calibration == "none":
        expected, after = compact_by_hand(*prompt, handle.stats.lengths)
    else:
        places, after = positions_by_hand(*prompt)
        expected = medians_by_hand(places, prompt[0], family.placeholder, handle.stats.groups)
    assert list(map(tuple, seen[0]["position_ids"][-3:, 0].T.tolist())) == expected
    for step, call in enumerate(seen[1:]):
        assert call["position_ids"][-3:].flatten().tolist() == 3 * [after + step]
