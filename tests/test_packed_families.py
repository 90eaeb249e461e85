"""Families whose projector or packing needs a whole grid: merging behind it; and videos, which stay as they are."""

from __future__ import annotations

import pytest
import torch
from checks import logits, new_ids
from families import BY_TITLE, IMAGE, PATCHES, QUESTIONS, SIDE, TWO_PICTURES, VIDEO, pictures
from models import picture, since_518
from packed import PACKED

from pitome_mllm import METHODS, attach, get_method
from pitome_mllm.hooks.tiles import at_most
from pitome_mllm.schedule import gentle, projector_counts

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # GLM's processor
# Families that differ in what says how many tokens a picture has.
LENGTHS = ("LLaVA-OneVision", "SmolVLM", "LLaVA-NeXT (1.6)", "Qwen3-VL", "InternVL", "Gemma 4", "Pixtral")


def merged(x, keep, method):
    """Features (N, C) merged to ``keep`` in rounds as by default: of at most 40 %, every token counting once."""
    reducer, x, sizes = get_method(method, **METHODS[method].library), x[None], torch.ones(1, len(x), 1)
    for count in projector_counts(x.shape[1], keep, gentle(reducer.max_removable)):
        merge = reducer.match(x, x.shape[1] - count, size=sizes, depth=1.0)
        x, sizes = merge.reduce_evenly(x, sizes)
    return x[0]


@torch.no_grad()
@pytest.mark.parametrize("size", [(60, 150), (100, 100), (140, 140), (40, 300)])
def test_onevision_merges_a_picture_without_its_newlines(size):
    """Newlines are found by their value here; the larger pictures are scaled down before."""
    family = BY_TITLE["LLaVA-OneVision"]
    model, plain = family.build(), family.build()
    inputs = family.process([(QUESTIONS[0], [picture(0).resize(size[::-1])])])
    given = {key: inputs[key] for key in family.sized}
    with attach(model, "tome", keep=0.25) as handle:
        assert handle.plan.where == "packed"
        (seen,) = model.model.get_image_features(**given).pooler_output
    (full,) = plain.model.get_image_features(**given).pooler_output
    assert len(full) == int((inputs["input_ids"] == IMAGE).sum())
    full = full[~(full == plain.model.image_newline).all(-1)]
    torch.testing.assert_close(seen, merged(full, round(len(full) / 4), "tome"), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_onevision_cuts_only_pictures_that_stand_alone():
    family = BY_TITLE["LLaVA-OneVision"]
    model = family.build()
    with attach(model, "pitome", keep=0.25) as handle:
        logits(model, family.process([(TWO_PICTURES, pictures(1, 2))]))
        assert handle.stats.lengths == (36, 36)
        logits(model, family.process([(QUESTIONS[0], pictures(1))]))
        assert handle.stats.lengths[0] > 36


@torch.no_grad()
def test_a_blank_tile_alone_is_a_picture():
    """Tiles that are all zero are padding, but where all are the model encodes the first."""
    family = BY_TITLE["SmolVLM"]
    model, inputs = family.build(), family.process([(QUESTIONS[0], pictures(0))])
    image = inputs["input_ids"][0] == model.config.image_token_id
    ids = inputs["input_ids"][:, ~image | (image.cumsum(0) <= PATCHES // 4)]
    blank = {"input_ids": ids, "pixel_values": torch.zeros_like(inputs["pixel_values"][:, :1])}
    width = logits(model, blank).shape[1]
    with attach(model, keep=0.25) as handle:
        seen = logits(model, blank)
        assert seen.shape[1] == width - PATCHES // 4 + handle.stats.lengths[0] < width


@torch.no_grad()
@pytest.mark.parametrize("title", ["Idefics3", "SmolVLM"])
def test_shuffled_patches_merge_behind_the_projector(title):
    family = BY_TITLE[title]
    model, plain, seen = family.build(), family.build(), []
    inputs = family.process([(QUESTIONS[0], pictures(0))])
    plain.model.connector.register_forward_hook(lambda module, args, output: seen.append(output))
    logits(plain, inputs)
    with attach(model, "pitome", keep=9) as handle:
        logits(model, inputs)
        assert handle.plan.available == PATCHES // 4 and handle.stats.images == len(seen[0]) > 1
        assert [int(sizes.sum()) for sizes in handle.stats.sizes] == [PATCHES // 4] * len(seen[0])
        features = model.model.get_image_features(inputs["pixel_values"], inputs["pixel_attention_mask"]).pooler_output
    expected = torch.cat([merged(tile, 9, "pitome") for tile in seen[0]])
    torch.testing.assert_close(torch.cat(list(features)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("title,reason", [("LLaVA-OneVision", "the whole grid"), ("Idefics3", "joins neighbouring")])
def test_other_places_are_refused_with_the_reason(title, reason):
    model = BY_TITLE[title].build()
    for where in ("tower", "projector", "both"):
        with pytest.raises(ValueError, match=rf"where='{where}' is not possible.*{reason}.*where='packed'"):
            attach(model, "pitome", keep=9, where=where)
    with pytest.raises(ValueError, match="ratio.*packed.*give keep"):
        attach(model, ratio=0.9)


def test_the_packed_place_is_for_tiles_and_for_features():
    model = BY_TITLE["LLaVA-1.5"].build()
    with pytest.raises(ValueError, match="where='packed' is not possible.*not cut into tiles.*where='tower'"):
        attach(model, keep=36, where="packed")
    model = BY_TITLE["LLaVA-NeXT (1.6)"].build()
    for settings, words in [
        ({"method": "pitome", "metric": "keys"}, "metric='keys'"),
        ({"method": "diffrate"}, "diffrate needs attention"),
        ({"method": "pool"}, "pool needs grid"),
        ({"method": "dct"}, "dct has no groups"),
    ]:
        with pytest.raises(ValueError, match=words):
            attach(model, keep=36, where="packed", **settings)


@pytest.mark.parametrize("title", LENGTHS)
def test_lengths_are_known_before_the_tower_runs(title):
    family = {family.title: family for family in (*BY_TITLE.values(), *PACKED)}[title]
    model, inputs = family.build(), family.process([(QUESTIONS[0], pictures(0)), (TWO_PICTURES, pictures(1, 2))])
    with attach(model, keep=0.25, where="packed") as handle:
        expected = at_most(handle, inputs)
        logits(model, inputs)
        assert tuple(expected) == handle.stats.lengths


FRAMES = 2
PER_FRAME = {  # visual tokens of one frame, and of a whole video besides
    "Video-LLaVA": (PATCHES + 1, 0),
    "LLaVA-NeXT-Video": (PATCHES // 4, 0),
    "LLaVA-OneVision": (PATCHES // 4, 1),
}


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("title", PER_FRAME)
def test_videos_stay_as_they_are(title, where, caplog):
    """Alone they are the plain model's, bit for bit; beside a picture, the picture merges."""
    family = BY_TITLE[title]
    model, plain = family.build(), family.build()
    frame, more = PER_FRAME[title]
    video = torch.full((1, FRAMES * frame + more), VIDEO)
    made = family.process([(QUESTIONS[0], pictures(0))])
    frames = torch.randn(1, FRAMES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    text = torch.tensor([[5, 6, 7]])
    alone = {"input_ids": torch.cat([text, video, text], 1), "pixel_values_videos": frames}
    ids = [video, made["input_ids"]] if where == "first" else [made["input_ids"], video, text]
    both = {**made, "input_ids": torch.cat(ids, 1), "pixel_values_videos": frames}
    both["attention_mask"] = torch.ones_like(both["input_ids"])
    alone["attention_mask"] = torch.ones_like(alone["input_ids"])
    with attach(model, keep=36, where=family.wheres[0]) as handle:
        assert torch.equal(logits(model, alone), logits(plain, alone))
        assert new_ids(model, alone, 3) == new_ids(plain, alone, 3)
        assert caplog.text.count(f"videos are not merged in {family.model}: {handle.family.videos}") == 1
        seen = logits(model, both)
        shorter = sum(family.full(plain, made)) - sum(handle.stats.lengths)
        assert shorter > 0 and seen.shape[1] == both["input_ids"].shape[1] - shorter
        assert new_ids(model, both, 1)[0][0] == int(seen[0, -1].argmax())


@torch.no_grad()
@pytest.mark.parametrize("family", PACKED, ids=lambda family: family.title)
def test_every_picture_merges_by_itself_behind_the_projector(family):
    """Each of its own share, in the container that the model makes."""
    model, plain = family.build(), family.build()
    inputs = family.process([(TWO_PICTURES, pictures(1, 2)), (QUESTIONS[0], pictures(0))])
    given = {name: value for name, value in inputs.items() if name in family.seen(plain)}
    full = plain.model.get_image_features(**given, return_dict=True).pooler_output
    with attach(model, "tome", keep=0.25):
        seen = model.model.get_image_features(**given, return_dict=True).pooler_output
    assert type(seen) is type(full) and len(seen) == len(full)
    for x, y in zip(full, seen, strict=True):
        torch.testing.assert_close(y, merged(x, round(len(x) / 4), "tome"), atol=1e-5, rtol=1e-5)


@since_518
@torch.no_grad()
@pytest.mark.parametrize("title", ["InternVL", "Qwen3-VL"])
def test_features_alone_do_not_tell_which_placeholders_go(title):
    (family,) = (family for family in PACKED if family.title == title)
    model, inputs = family.build(), family.process([(QUESTIONS[0], pictures(1))])
    given = {name: x for name, x in inputs.items() if name in family.seen(model)}
    rest = {name: x for name, x in inputs.items() if name != "pixel_values"}
    with attach(model, keep=0.25, calibration="none"):
        features = {"image": model.model.get_image_features(**given, return_dict=True)}
        for call in (model, model.generate):
            with pytest.raises(ValueError, match="only the pictures tell.*as pixel_values"):
                call(**rest, mm_encoder_outputs=features)
