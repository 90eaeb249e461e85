"""Pictures cut into tiles: survivors in reading order, newlines, padding left out, real lengths, the packed place."""

from __future__ import annotations

import copy
from statistics import median_low

import pytest
import torch
from by_hand import states
from checks import logits, new_ids, positions_of
from families import BY_TITLE, IMAGE, PATCHES, QUESTIONS, SIDE, TWO_PICTURES, pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from models import picture, since_518
from transformers import LogitsProcessorList

from pitome_mllm import attach, get_method
from pitome_mllm.families.anyres import Places, survivors
from pitome_mllm.hooks.tiles import _places
from pitome_mllm.schedule import projector_counts

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
NEXT = BY_TITLE["LLaVA-NeXT (1.6)"]
GRID = SIDE // 4


@pytest.fixture(scope="module")
def plain():
    return NEXT.build()


@pytest.fixture
def model():
    return NEXT.build()


def places_of(model, size):
    """What the model's own packing does with the indices of patches; written anew here."""
    height, width = size
    core = model.model
    best = max(
        core.config.image_grid_pinpoints,
        key=lambda p: (lambda s: (min(int(width * s) * int(height * s), width * height), -(p[0] * p[1])))(
            min(p[1] / width, p[0] / height)
        ),
    )
    rows, columns = best[0] // SIDE * GRID, best[1] // SIDE * GRID
    if width / height > columns / rows:
        cut = (rows - int(round(height * columns / width, 7))) // 2
        kept = [(r, c) for r in range(cut, rows - cut) for c in range(columns)]
    else:
        cut = (columns - int(round(width * rows / height, 7))) // 2
        kept = [(r, c) for r in range(rows) for c in range(cut, columns - cut)]
    source = list(range(PATCHES))
    for i, (r, c) in enumerate(kept):
        tile = 1 + (r // GRID) * (columns // GRID) + c // GRID
        source.append(tile * PATCHES + (r % GRID) * GRID + c % GRID)
        if i + 1 == len(kept) or kept[i + 1][0] != r:
            source.append(-1)
    return source


def packed_by_hand(source, tiles, newline):
    """Tiles {(tile, patch) index: (token, feature)}: survivors in the order of their first visible patch."""
    seen, out = set(), []
    for place in source:
        if place < 0:
            out.append(newline)
            continue
        token, feature = tiles[place]
        if token not in seen:
            seen.add(token)
            out.append(feature)
    return torch.stack(out)


SHAPES = [(60, 150), (90, 40), (100, 100), (48, 48), (30, 300), (47, 145)]  # heights and widths


@torch.no_grad()
@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("where", ["tower", "projector"])
def test_merged_tiles_are_packed_as_defined(model, plain, size, where):
    inputs = NEXT.process([(QUESTIONS[0], [picture(0).resize(size[::-1])])])
    with attach(
        model, "pitome", published=True, keep=36, where=where, metric="keys" if where == "tower" else "hidden"
    ) as handle:
        seen = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    tower, reducer, pixels = plain.model.vision_tower, get_method("pitome"), inputs["pixel_values"][0]
    x = states(tower, pixels, handle.plan.counts, reducer, 1)[5]
    for count in handle.plan.projector_counts:
        x = reducer.match(x, x.shape[1] - 1 - count, protected=1, depth=1.0).reduce(x)[0] if where != "tower" else x
    if where == "projector":  # sizes count in the second round: take the groups that were made
        x = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        x = torch.stack([torch.stack([t[g == k].mean(0) for k in range(36)]) for t, g in zip(x, handle.stats.groups)])
    else:
        x = x[:, 1:]
    features, groups = plain.model.multi_modal_projector(x), handle.stats.groups
    tiles = {
        t * PATCHES + p: ((t, int(groups[t, p])), features[t, groups[t, p]])
        for t in range(len(groups))
        for p in range(PATCHES)
    }
    expected = packed_by_hand(places_of(plain, size), tiles, plain.model.image_newline)
    assert handle.stats.lengths == (len(expected),)
    torch.testing.assert_close(seen[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", SHAPES)
def test_places_are_those_of_the_model(model, size):
    inputs = NEXT.process([(QUESTIONS[0], [picture(0).resize(size[::-1])])])
    handle = attach(model, "pitome", published=True, keep=36)
    logits(model, inputs)
    assert handle.places[(*size, True)].source.tolist() == places_of(model, size)
    assert len(handle.places[(*size, True)]) == int((inputs["input_ids"] == IMAGE).sum())


def test_the_packing_of_the_last_sizes_is_remembered(model):
    handle = attach(model, "pitome", published=True, keep=36)
    sizes = [(side, 60) for side in range(40, 140)]
    seen = [_places(handle, size, True) for size in sizes]
    assert list(handle.places) == [(*size, True) for size in sizes[-64:]]
    assert _places(handle, sizes[-1], True) is seen[-1]
    assert _places(handle, sizes[0], True).source.tolist() == seen[0].source.tolist()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_survivors(data):
    """Against a loop: tokens in the order of their first visible patches, sizes of what is visible, groups consistent,
    medians.
    """
    tiles, patches, count = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 6)), data.draw(st.integers(1, 4))
    numbers = st.lists(st.integers(-1, count - 1), min_size=patches, max_size=patches)
    groups = torch.tensor([data.draw(numbers) for _ in range(tiles)])
    order = data.draw(st.permutations(range(tiles * patches)))
    source = [s for s in order[: data.draw(st.integers(1, len(order)))] for s in ([s, -1] if s % 3 == 0 else [s])]
    packed = survivors(Places(torch.tensor(source), patches), groups, count)
    token, found = [], {}
    for place, s in enumerate(source):
        own = -1 if s < 0 else int(groups[s // patches, s % patches])
        name = "newline" if s < 0 else None if own < 0 else s // patches * count + own
        if name == "newline" or (name is not None and name not in token):
            token.append(-1 if name == "newline" else name)
        found.setdefault(name, []).append(place)
    assert packed.token.tolist() == token
    newlines = iter(found.get("newline", []))
    assert packed.median.tolist() == [next(newlines) if t < 0 else median_low(found[t]) for t in token]
    assert packed.size.tolist() == [1 if t < 0 else len(found[t]) for t in token]
    for place, s in enumerate(source):
        own = -2 if s < 0 else int(groups[s // patches, s % patches])
        at = int(packed.group[place])
        assert (at == -1) == (own == -1)
        assert at == -1 or packed.token[at] == (-1 if s < 0 else s // patches * count + own)


def test_lengths_are_the_real_ones(model):
    """Two pictures of one size keep different numbers, and forward() agrees with what the features are."""
    inputs = NEXT.process([(TWO_PICTURES, [picture(n).resize((150, 60)) for n in (0, 1)])])
    handle = attach(model, "pitome", published=True, keep=36)
    seen = logits(model, inputs)
    lengths = handle.stats.lengths
    assert f"images: 2, visual tokens: {sum(lengths)} of {(inputs['input_ids'] == IMAGE).sum()}" in repr(handle.stats)
    assert lengths[0] != lengths[1] and seen.shape[1] == (inputs["input_ids"] != IMAGE).sum() + sum(lengths)
    newlines, tiles = places_of(model, (60, 150)).count(-1), len(handle.stats.groups) // 2
    assert all(36 + newlines < n <= tiles * 36 + newlines for n in lengths)  # overview, newlines, what is no padding


# ---- the packed place ------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("keep", [0.25, 36])
@pytest.mark.parametrize("method", ["pitome", "tome", "random"])
@pytest.mark.parametrize("size", [(60, 150), (100, 100)])
def test_the_packed_place_merges_a_picture_without_its_newlines(model, plain, size, method, keep):
    inputs = NEXT.process([(TWO_PICTURES, [picture(n).resize(size[::-1]) for n in (0, 1)])])
    with attach(model, method, published=True, keep=keep, where="packed") as handle:
        seen = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    full = plain.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    newline = torch.tensor(places_of(plain, size)) < 0
    reducer = get_method(method)
    for features, merged, groups in zip(full, seen, handle.stats.groups, strict=True):
        x, sizes = features[~newline][None], None
        wanted = keep if keep > 1 else round(keep * x.shape[1])
        for count in projector_counts(x.shape[1], wanted, reducer.max_removable):
            merge = reducer.match(x, x.shape[1] - count, size=sizes, depth=1.0)
            x, sizes = merge.reduce(x, sizes)
        assert len(merged) == wanted and bool((groups[newline] == -1).all())
        torch.testing.assert_close(merged, x[0], atol=1e-5, rtol=1e-5)
    assert len(set(handle.stats.lengths)) == 1, "the count follows from the size alone"


# ---- what the LLM is told --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["tower", "packed"])
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_original_positions_are_places_in_the_long_prompt(model, call, where):
    inputs = NEXT.process([(TWO_PICTURES, pictures(1, 2))])
    handle = attach(model, "pitome", published=True, keep=36, calibration="distance", where=where)
    seen = positions_of(model, inputs, call)
    image, start = inputs["input_ids"][0] == IMAGE, 0
    columns = image.nonzero()[:, 0]
    kept = []
    for median, full in zip(handle.stats.median, NEXT.full(NEXT.build(), inputs), strict=True):
        kept.append(columns[start : start + full][median])
        start += full
    expected = torch.cat([*kept, (~image).nonzero()[:, 0]]).sort().values
    assert torch.equal(seen[0][0].sort().values, expected)


@since_518
@pytest.mark.parametrize("where", ["tower", "packed"])
def test_features_that_a_model_lends_while_it_generates(model, where):
    """Another one that gets them, with its own ids of a short prompt, places them where the first one does."""
    inputs, draft, found = NEXT.process([(TWO_PICTURES, pictures(1, 2))]), copy.deepcopy(model), []
    settings = {"keep": 36, "calibration": "distance", "where": where}
    with attach(model, "tome", published=True, **settings), attach(draft, "tome", published=True, **settings):
        with torch.no_grad():
            features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True)
        ids, left = inputs["input_ids"], [len(image) for image in features.pooler_output]
        starts = [torch.arange(full) < kept for full, kept in zip(NEXT.full(NEXT.build(), inputs), left, strict=True)]
        stays = torch.ones_like(ids, dtype=torch.bool).masked_scatter(ids == IMAGE, torch.cat(starts))
        ids = ids[:, stays[0]]

        def ask(seen, scores):
            found.append(logits(draft, {"input_ids": ids}, mm_encoder_outputs={"image": features})[:, -1].float())
            found.append(scores)
            return scores

        model.generate(**inputs, max_new_tokens=1, do_sample=False, logits_processor=LogitsProcessorList([ask]))
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


def test_an_interrupt_leaves_no_encoded_images(model):
    inputs = NEXT.process([(QUESTIONS[0], pictures(1))])
    handle = attach(model, "pitome", published=True, keep=36)
    seen = []

    def interrupt(*_):
        seen.append(handle.encoded is not None)
        raise KeyboardInterrupt

    hook = model.get_input_embeddings().register_forward_hook(interrupt)
    try:
        model(**inputs)
    except KeyboardInterrupt:
        hook.remove()
    assert seen == [True] and handle.encoded is None
    logits(model, inputs)
    assert handle.stats.counts[-1] == 36


def test_sizes_weigh_in_the_llm(model):
    inputs = NEXT.process([(QUESTIONS[0], pictures(1))])
    with attach(model, "pitome", published=True, keep=36) as handle:
        unweighed = logits(model, inputs)
        with handle.using(calibration="size"):
            weighed = logits(model, inputs)
            sizes = handle.stats.sizes[0]
            assert sizes.sum() == NEXT.full(NEXT.build(), inputs)[0]  # every visible patch counts once
            assert [new_ids(model, inputs, 1)[0][0]] == weighed[:, -1].argmax(-1).tolist()
    assert (weighed - unweighed).abs().max() > 1e-3


@pytest.mark.parametrize("where", ["tower", "packed"])
def test_beams(model, where):
    rows = [(QUESTIONS[0], pictures(1)), (QUESTIONS[1], pictures(3))]
    with attach(model, keep=36, where=where):
        options = dict(num_beams=3, max_new_tokens=4, do_sample=False)
        together = model.generate(**NEXT.process(rows), **options)[:, -4:]
        for row, answer in zip(rows, together, strict=True):
            assert model.generate(**NEXT.process([row]), **options)[0, -4:].tolist() == answer.tolist()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(model, checkpointing):
    inputs = NEXT.process([(QUESTIONS[0], pictures(1))])
    attach(model, "pitome", published=True, keep=36)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    model(**inputs, labels=labels).loss.backward()
    gradient = model.model.vision_tower.encoder.layers[0].self_attn.v_proj.weight.grad
    assert gradient.abs().max() > 0 and model.model.image_newline.grad.abs().max() > 0
