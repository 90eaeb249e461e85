"""Where and how much: tower, projector, both; every way of saying how many; every setting; every method; the stats."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from checks import assert_merged_like, assert_row, assert_works, logits, reference
from models import PATCHES, QUESTION, build, picture, processor

from pitome_mllm import METHODS, Schedule, attach, get_method
from pitome_mllm.families import FAMILIES
from pitome_mllm.families.encoders import ENCODERS
from pitome_mllm.families.geometry import Geometry, geometry
from pitome_mllm.plan import make_plan
from pitome_mllm.schedule import projector_counts
from pitome_mllm.settings import Settings

BLOCKS = 6  # of 7, since the features come from the last but one


def run(model, inputs, method=None, **settings):
    """Attach, run once, detach: (plan, stats, logits)."""
    with attach(model, method, **settings) as handle:
        seen = logits(model, inputs)
        return handle.plan, handle.stats, seen


def assert_consistent(plan, stats, images, keep, before=PATCHES):
    """What the stats say agrees with the plan and with itself."""
    assert plan.keep == keep and plan.available == before
    assert (stats.images, stats.tokens_before, stats.tokens_after) == (images, before, keep)
    assert (stats.method, stats.where, stats.counts) == (plan.method, plan.where, plan.counts)
    assert stats.sizes.shape == (images, keep) and stats.sizes.dtype == torch.float32
    assert stats.groups.shape == (images, before) and stats.groups.dtype == torch.int64
    for groups, sizes in zip(stats.groups, stats.sizes, strict=True):
        alive = groups[groups >= 0]
        assert alive.unique().tolist() == list(range(keep))
        assert groups.min() >= -1
        assert torch.equal(alive.bincount(minlength=keep).float(), sizes)


# ---- how many --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["tower", "projector", "both"])
def test_keep_is_exact(model, pair, where):
    for keep in (9, 54, 144, 145, 289, 575, 576):
        plan, stats, seen = run(model, pair, "pitome", keep=keep, where=where)
        assert_consistent(plan, stats, images=2, keep=keep)
        assert seen.shape[1] == pair.input_ids.shape[1] - PATCHES + keep


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_projector_reaches_one_token(model, one, keep):
    plan, stats, _ = run(model, one, "pitome", keep=keep, where="projector")
    assert_consistent(plan, stats, images=1, keep=keep)


@pytest.mark.parametrize("share,count", [(0.25, 144), (1.0, 576), (0.5, 288), (0.1, 58)])
def test_keep_as_a_share(model, one, share, count):
    plan, stats, _ = run(model, one, "pitome", keep=share)
    assert_consistent(plan, stats, images=1, keep=count)


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9, 0.975])
def test_ratio_is_the_papers(model, plain, one, ratio):
    with attach(model, "pitome", published=True, ratio=ratio) as handle:
        left, expected = PATCHES, []
        for _ in range(BLOCKS):
            left -= min(math.floor(left - ratio * left), left // 2)
            expected.append(left)
        assert list(handle.plan.counts) == expected and handle.plan.keep == expected[-1]
        assert_works(handle, model, plain, one)


def test_explicit_counts(model, plain, one):
    counts = [576, 400, 400, 250, 144, 144]
    with attach(model, "pitome", published=True, counts=counts) as handle:
        assert list(handle.plan.counts) == counts and handle.plan.keep == 144
        assert_works(handle, model, plain, one)


@pytest.mark.parametrize("shape", ["equal", "delayed"])
def test_schedule_shapes(model, plain, one, shape):
    with attach(model, "pitome", published=True, keep=100, schedule=shape) as handle:
        assert list(handle.plan.counts) == Schedule(keep=100, shape=shape).counts(PATCHES, BLOCKS)
        assert handle.plan.counts[-1] == 100
        assert_works(handle, model, plain, one)


def test_few_merges_keep_their_depth(model, plain, one):
    with attach(model, "pitome", published=True, keep=200, merges=3) as handle:
        assert handle.plan.merging == (0, 2, 5) and handle.plan.counts[-1] == 200
        assert [depth for *_, depth in handle.plan.steps] == [0, 2 / BLOCKS, 5 / BLOCKS]
        assert_works(handle, model, plain, one)


def test_a_number_of_merges_gives_way_to_what_says_more():
    geometry = Geometry(grid=(24, 24), class_tokens=1, visible_class_tokens=0, merging_blocks=23, blocks=24)
    settings = Settings().changed(keep=144)
    few = (1, 4, 7, 10, 13, 16)

    def merging(settings):
        return make_plan(settings, geometry).merging

    assert merging(settings) == few
    assert merging(settings.changed(where="projector")) == ()
    assert merging(settings.changed(ratio=0.9)) == merging(settings.changed(merges="every")) == tuple(range(23))
    assert merging(settings.changed(method="tome")) == few
    assert merging(settings.changed(published=True)) == tuple(range(23))  # a paper's: every block
    asked = settings.changed(merges=4)
    assert len(merging(asked)) == len(merging(asked.changed(method="tome"))) == 4
    assert merging(asked.changed(where="tower").changed(method="visionzip")) == (22,)  # which reduces in one step
    for away in ({"ratio": 0.9}, {"where": "projector"}):  # and back: the default
        assert merging(asked.changed(**away).changed(where="both", keep=144)) == few
    assert merging(asked.changed(merges=None)) == few
    with pytest.raises(ValueError, match="ratio says what every block removes, got merges=4"):
        merging(settings.changed(ratio=0.9).changed(merges=4))


IN_BLOCKS = {"merges": 4, "schedule": "early", "place": "end", "proportional_attention": False}


@pytest.mark.parametrize("setting", IN_BLOCKS)
def test_what_is_said_of_blocks_is_refused_where_none_merges_and_forgotten_on_the_way_there(setting):
    geometry = Geometry(grid=(24, 24), class_tokens=1, visible_class_tokens=0, merging_blocks=23, blocks=24)
    value = IN_BLOCKS[setting]
    asked = Settings().changed(keep=144, **{setting: value})
    there = asked.changed(where="projector")
    assert make_plan(there, geometry).where == "projector" and getattr(there, setting) is None
    with pytest.raises(ValueError, match=rf"{setting}={value!r} says .*no block merges with where='projector'; leave"):
        make_plan(there.changed(**{setting: value}), geometry)
    once = asked.changed(where="tower").changed(method="visionzip", where="tower", **{setting: value})
    scaled = Settings().changed(method="downsample", keep=144, **{setting: value})
    if setting in ("merges", "schedule"):
        with pytest.raises(ValueError, match=f"{setting}={value!r} says .*but visionzip reduces in one step"):
            make_plan(once, geometry)
        for more in ({"ratio": 0.9}, {"counts": [500] * 23}):
            assert make_plan(asked.changed(**more), geometry) == make_plan(Settings().changed(**more), geometry)
            with pytest.raises(ValueError, match=f"{[*more][0]} .*says what every block"):
                make_plan(Settings().changed(**more, **{setting: value}), geometry)
    else:
        assert make_plan(once, geometry).merging == (22,)
        with pytest.raises(ValueError, match=f"{setting}={value!r} says .*but downsample scales the picture"):
            make_plan(scaled, geometry)


def test_what_is_said_of_an_encoders_blocks_stays_whatever_the_methods_place_in_llms():
    alone = Geometry((4, 4), 1, 0, 12, 12, family=ENCODERS["CLIPModel"])
    asked = Settings().changed(method="visionzip", keep=4, place="end", proportional_attention=False)
    for settings in (asked, asked.changed(keep=8)):
        plan = make_plan(settings, alone)
        assert (plan.where, plan.place, plan.proportional_attention) == ("tower", "end", False)


@pytest.mark.parametrize(
    "method, places", [("dart", "tower projector packed"), ("prumerge", "tower projector"), ("downsample", "tower")]
)
def test_one_step_names_the_places_that_are_possible(method, places):
    tiled = Geometry((24, 24), 1, 0, 23, 24, family=FAMILIES["LlavaNextForConditionalGeneration"])
    said = " or ".join(f"where={place!r}" for place in places.split())
    with pytest.raises(ValueError, match=f"choose {said}, and give keep"):
        make_plan(Settings().changed(method=method, ratio=0.9), tiled)
    with pytest.raises(ValueError, match=r"got keep=144 and ratio=0\.9: give one|ratio and counts say"):
        make_plan(Settings().changed(method=method, ratio=0.9, keep=144), tiled)


@pytest.mark.parametrize("where", ["both", "projector"])
@pytest.mark.parametrize("keep", [287, 144, 72, 16, 1])
@pytest.mark.parametrize("blocks", [1, 2, 5, 23])
def test_with_few_merges_nothing_removes_over_two_fifths(where, keep, blocks):
    """Where a tower of few blocks cannot come to a third by that, the rest goes before the projector."""
    geometry = Geometry(grid=(24, 24), class_tokens=1, visible_class_tokens=0, merging_blocks=blocks, blocks=24)
    few = make_plan(Settings().changed(keep=keep, where=where), geometry)
    every = make_plan(Settings().changed(published=True, keep=keep, where=where), geometry)
    assert all(before - after <= max(0.4 * before, 1) for before, after, _ in few.steps)
    assert list(every.projector_counts) == projector_counts(every.counts[-1], keep)  # at most half, as ever
    assert few.keep == every.keep == keep
    assert blocks < 23 or few.counts[-1] == every.counts[-1]


@pytest.mark.parametrize("layer,blocks", [(-1, 7), (-2, 6), (-4, 4), (5, 5), (1, 1)])
def test_only_blocks_that_feed_the_projector_merge(one, layer, blocks):
    model = build(feature_layer=layer)
    with attach(model, "pitome", published=True, keep=300) as handle:
        seen = logits(model, one)
        assert len(handle.plan.counts) == blocks
        assert_consistent(handle.plan, handle.stats, images=1, keep=300)
        expected = reference(build(feature_layer=layer), one, handle.plan.counts)
        assert_merged_like(handle, expected.tokens)
        assert_row(seen[0], expected.logits())


def test_a_tower_without_class_token():
    model = build(tower="siglip", strategy="full", feature_layer=-1)
    inputs = processor(strategy="full", class_token=False)(images=[picture(0)], text=QUESTION, return_tensors="pt")
    plan, stats, seen = run(model, inputs, "pitome", keep=144)
    assert_consistent(plan, stats, images=1, keep=144)
    assert len(plan.counts) == 7
    assert seen.shape[1] == inputs.input_ids.shape[1] - PATCHES + 144


def test_a_visible_class_token_is_counted_and_kept():
    model = build(strategy="full")
    inputs = processor(strategy="full")(images=[picture(0)], text=QUESTION, return_tensors="pt")
    plan, stats, seen = run(model, inputs, "pitome", published=True, keep=145)
    assert_consistent(plan, stats, images=1, keep=145, before=PATCHES + 1)
    assert plan.counts[-1] == 144  # patches; the class token comes on top
    assert (stats.groups[0, 0], stats.sizes[0, 0]) == (0, 1)
    assert seen.shape[1] == inputs.input_ids.shape[1] - 577 + 145


# ---- where -----------------------------------------------------------------------------------------------------------


def test_the_tower_merges_as_defined(model, plain, pair):
    plan, stats, seen = run(model, pair, "pitome", published=True, keep=144)
    expected = reference(plain, pair, plan.counts)
    assert torch.equal(stats.groups, expected.tokens.groups)
    assert torch.equal(stats.sizes, expected.tokens.sizes)
    for row in range(2):
        assert_row(seen[row], expected.logits(row))
    assert list(plan.projector_counts) == [] and plan.where == "tower"


def test_the_default_is_pitome(model, one):
    plan, stats, seen = run(model, one, keep=144)
    assert (plan.method, plan.where, len(plan.merging)) == ("pitome", "both", BLOCKS)
    again = run(model, one, "pitome", keep=144)
    assert torch.equal(stats.groups, again[1].groups) and torch.equal(seen, again[2])


@pytest.mark.parametrize("amount", [{"ratio": 0.9}, {"counts": [500, 400, 300, 300, 200, 144]}], ids=str)
def test_the_default_leaves_ratio_and_counts_to_the_tower(model, one, amount):
    plan, stats, _ = run(model, one, **amount)
    assert (plan.method, plan.where, plan.projector_counts) == ("pitome", "tower", ())
    assert list(plan.counts) == list(run(model, one, published=True, **amount)[0].counts)
    assert_consistent(plan, stats, images=1, keep=plan.counts[-1])


@pytest.mark.parametrize(
    "text", [{"_attn_implementation": "flash_attention_2"}, {"layer_types": ["chunked_attention", "full_attention"]}]
)
def test_the_default_goes_without_what_the_llm_does_not_take(model, caplog, text):
    for name, value in text.items():
        setattr(model.config.text_config, name, value)
    with caplog.at_level("WARNING"), attach(model, keep=144) as handle:
        assert handle.plan.calibration == "none"
        assert handle.plan.keep == 144
        with handle.using(keep=72), handle.using("tome"):
            handle.update(keep=100)
    assert caplog.text.count("calibration='none', which costs accuracy: the LLM") == 1
    for calibration in ("size", "distance"):  # what the caller asks for is not taken away in silence
        with pytest.raises(ValueError, match=f"calibration='{calibration}' is not possible: the LLM.*'none'"):
            attach(model, keep=144, calibration=calibration)


def test_attention_that_is_switched_after_attach_counts(model):
    text = model.config.text_config
    text._attn_implementation = "flash_attention_2"
    with attach(model, keep=144) as handle:
        text._attn_implementation = "sdpa"
        handle.update(keep=100)
        assert handle.plan.calibration == "distance"
        text._attn_implementation = "flash_attention_2"
        with handle.using(keep=72):
            assert handle.plan.calibration == "none"
        with pytest.raises(ValueError, match="calibration='size' is not possible: the LLM's attention"):
            handle.update(calibration="size")


def test_an_llm_without_rotary_embedding_is_told_of_sizes(model):
    without = replace(geometry(model), llm_rotary=False)
    asked = Settings().changed(method="pitome", keep=144)
    assert make_plan(asked, without).calibration == "size"
    with pytest.raises(ValueError, match="calibration='distance' is not possible.*calibration='size'"):
        make_plan(asked.changed(calibration="distance"), without)


def test_a_reducer_instance_is_a_method(model, plain, one):
    reducer = get_method("pitome", margin=0.45, alpha=0.5, energy="elu")
    by_instance = run(model, one, reducer, keep=144)
    by_name = run(model, one, "pitome", keep=144, margin=0.45, alpha=0.5, energy="elu", protect=1.0)
    default = run(model, one, "pitome", keep=144)
    assert torch.equal(by_instance[2], by_name[2])
    assert torch.equal(by_instance[1].groups, by_name[1].groups)
    assert not torch.equal(by_name[1].groups, default[1].groups)


@torch.no_grad()
def by_rounds(x, metric, counts, reducer):
    """Merge features (B, N, C) in rounds, at depth 1: (features, groups)."""
    size, groups = torch.ones(*x.shape[:2], 1), torch.arange(x.shape[1]).expand(x.shape[:2])
    for count in counts:
        merge = reducer.match(metric, x.shape[1] - count, size=size, depth=1.0)
        metric = merge.reduce(metric, size)[0]
        x, size = merge.reduce(x, size)
        groups = merge.group.gather(1, groups)
    return x, groups


@torch.no_grad()
def tower_output(plain, inputs):
    """Features in front of the projector and the keys of the block that made them, class token left out."""
    tower, keys = plain.model.vision_tower, []
    last = tower.encoder.layers[BLOCKS - 1].self_attn
    hook = last.k_proj.register_forward_hook(lambda module, args, out: keys.append(out))
    x = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    hook.remove()
    return x[:, 1:], keys[0].unflatten(-1, (last.num_heads, -1)).mean(2)[:, 1:]


@pytest.mark.parametrize("metric", ["keys", "hidden"])
@pytest.mark.parametrize("keep", [400, 144, 60])
def test_the_projector_merges_in_rounds_of_at_most_half(model, pair, keep, metric):
    settings = {"keep": keep, "where": "projector", "metric": metric}
    plan, stats, _ = run(model, pair, "pitome", published=True, **settings)
    assert_consistent(plan, stats, images=2, keep=keep)
    steps = [PATCHES, *plan.projector_counts]
    assert steps[-1] == keep and all(after >= before // 2 for before, after in zip(steps, steps[1:], strict=False))
    assert len(plan.projector_counts) == math.ceil(math.log2(PATCHES / keep))
    assert list(plan.counts) == [PATCHES] * BLOCKS
    twin = build()  # not the shared one: it gets a hook
    x, keys = tower_output(twin, pair)
    features, groups = by_rounds(x, x if metric == "hidden" else keys, plan.projector_counts, get_method("pitome"))
    assert torch.equal(stats.groups, groups)
    with attach(model, "pitome", published=True, **settings), torch.no_grad():
        seen = model.model.get_image_features(pair["pixel_values"], return_dict=True).pooler_output
    torch.testing.assert_close(torch.stack(list(seen)), twin.model.multi_modal_projector(features))


@pytest.mark.parametrize("tower_keep,reached", [(None, 192), (300, 300), (144, 144), (576, 576)])
def test_both_places(model, one, tower_keep, reached):
    plan, stats, _ = run(model, one, "pitome", keep=144, where="both", tower_keep=tower_keep)
    assert plan.counts[-1] == reached  # the default is a third of 576
    assert (plan.projector_counts[-1] if plan.projector_counts else reached) == 144
    assert_consistent(plan, stats, images=1, keep=144)


# ---- settings of the merge -------------------------------------------------------------------------------------------

SETTINGS = [
    {},
    {"place": "end"},
    {"metric": "hidden"},
    {"metric": "hidden", "place": "end"},
    {"weighted": False},
    {"proportional_attention": False},
    {"place": "end", "metric": "hidden", "weighted": False, "proportional_attention": False},
]


@pytest.mark.parametrize(
    "method,settings",
    [*(("pitome", settings) for settings in SETTINGS), ("pitome-bsm", {}), ("tome", SETTINGS[-1])],
    ids=str,
)
def test_settings_do_what_they_say(model, plain, one, method, settings):
    plan, stats, seen = run(model, one, method, published=True, keep=144, **settings)
    by_hand = {"proportional" if k == "proportional_attention" else k: v for k, v in settings.items()}
    expected = reference(plain, one, plan.counts, method, **by_hand)
    assert torch.equal(stats.groups, expected.tokens.groups)
    assert_consistent(plan, stats, images=1, keep=144)
    assert_row(seen[0], expected.logits())


def test_settings_differ_from_each_other(model, one):
    seen = [run(model, one, "pitome", published=True, keep=144, **settings)[2] for settings in SETTINGS]
    for i, a in enumerate(seen):
        assert all((a - b).abs().max() > 1e-3 for b in seen[i + 1 :])


def test_an_llm_that_takes_no_mask_any_more(model, one):
    with attach(model, "pitome", keep=72, calibration="size"):
        model.model.language_model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="calibration='size' is not possible.*flash_attention_2"):
            logits(model, one)
        model.model.language_model.config._attn_implementation = "sdpa"
        model.model.language_model.config.layer_types = ["chunked_attention", "full_attention"]
        with pytest.raises(ValueError, match="chunked_attention"):
            logits(model, one)


def test_tokens_leave_in_reading_order(model, pair):
    for method in ("pitome", "pitome-bsm", "tome", "random", "pool"):
        _, stats, _ = run(model, pair, method, keep=144)
        for groups in stats.groups:
            first = [groups.tolist().index(group) for group in range(144)]
            assert first == sorted(first)


def test_source_order_is_the_same_merge_in_another_order(model, one):
    """In one block and after it nothing can depend on the order, so features are the same up to their order."""
    settings = {"counts": [576] * (BLOCKS - 1) + [300], "place": "end"}
    features, groups = [], []
    for order in ("reading", "source"):
        with attach(model, "pitome", published=True, order=order, **settings) as handle, torch.no_grad():
            seen = model.model.get_image_features(one["pixel_values"], return_dict=True).pooler_output
            features.append(torch.stack(list(seen))[0])
            groups.append(handle.stats.groups[0])
    reading, source = groups
    renamed = torch.full((300,), -1).scatter(0, reading, source)
    assert torch.equal(renamed[reading], source) and len(renamed.unique()) == 300
    assert not torch.equal(reading, source)
    torch.testing.assert_close(features[0], features[1][renamed])


def test_pitome_llava_is_out_of_reading_order_by_default(model, one):
    plan, stats, seen = run(model, one, "pitome-llava", keep=144)
    assert_consistent(plan, stats, images=1, keep=144)
    first = [stats.groups[0].tolist().index(group) for group in range(144)]
    assert first != sorted(first)
    reading = run(model, one, "pitome-llava", keep=144, order="reading")
    assert (seen - reading[2]).abs().max() > 1e-3


# ---- every method ----------------------------------------------------------------------------------------------------


def cannot(method: str, where: str) -> bool:
    """What has one step cannot take two, and what makes the picture smaller works in front of the tower only."""
    return get_method(method).once and (where == "both" or (method, where) == ("downsample", "projector"))


@pytest.mark.parametrize("where", ["tower", "projector", "both"])
@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_merges_everywhere_or_says_why_not(model, pair, method, where):
    reducer = get_method(method)
    keep = 144
    assert keep in reducer.allowed(PATCHES)
    try:
        handle = attach(model, method, keep=keep, where=where)
    except ValueError as error:
        assert where in str(error) and method in str(error)
        assert cannot(method, where)
        return
    assert not cannot(method, where)
    seen = logits(model, pair)
    plan, stats = handle.plan, handle.stats
    assert (plan.method, plan.keep, stats.tokens_after) == (method, keep, keep)
    assert seen.isfinite().all()
    assert seen.shape[1] == pair.input_ids.shape[1] - PATCHES + keep
    if stats.groups is not None:
        assert_consistent(plan, stats, images=2, keep=keep)
    alone = {"input_ids": pair["input_ids"][1:], "attention_mask": pair["attention_mask"][1:]}
    second = logits(model, {**alone, "pixel_values": pair["pixel_values"][1:]})
    if stats.groups is not None:
        assert torch.equal(handle.stats.groups[0], stats.groups[1]), "a row must not depend on its batch"
    assert_row(seen[1], second[0])


@pytest.fixture(scope="module")
def towers():
    """A model with each kind of tower, and one picture for it."""
    siglip = build(tower="siglip", strategy="full", feature_layer=-1)
    inputs = [processor(), processor(strategy="full", class_token=False)]
    inputs = [make(images=[picture(0)], text=QUESTION, return_tensors="pt") for make in inputs]
    return dict(zip(("clip", "siglip"), zip((build(), siglip), inputs, strict=True), strict=True))


@pytest.mark.parametrize("method", list(METHODS))
def test_every_keep_is_reached_exactly(towers, method):
    """Of every method, on both kinds of tower and at every place; what cannot be says why."""
    for tower, where in (("clip", "tower"), ("clip", "both"), ("siglip", "tower"), ("siglip", "projector")):
        every_keep_is_reached(*towers[tower], method, tower, where)


def every_keep_is_reached(model, inputs, method, tower, where):
    needs = get_method(method).needs
    try:
        handle = attach(model, method, keep=288, where=where)
    except ValueError as error:
        lacking = tower == "siglip" and "attention" in needs
        assert ("class token" if lacking else where) in str(error) and method in str(error)
        assert lacking or cannot(method, where)
        return
    assert not cannot(method, where)
    with handle:
        for keep in (288, 72, 16):
            handle.update(keep=keep)
            seen = logits(model, inputs)
            assert seen.isfinite().all() and seen.shape[1] == inputs.input_ids.shape[1] - PATCHES + keep
            assert handle.stats.tokens_after == keep and handle.stats.sizes.shape == (1, keep)
            if handle.stats.groups is not None:
                assert handle.stats.groups.unique().tolist()[-keep:] == list(range(keep))


def test_methods_differ(model, one):
    seen = {name: run(model, one, name, keep=144, where="tower")[2] for name in METHODS}
    for a in METHODS:
        assert all((seen[a] - seen[b]).abs().max() > 1e-3 for b in METHODS if a != b)


# ---- stats -----------------------------------------------------------------------------------------------------------


def test_stats_are_none_before_the_first_run(model):
    assert attach(model, keep=144).stats is None


def test_energies_on_request(model, plain, pair):
    plan, stats, _ = run(model, pair, "pitome", published=True, keep=144)
    assert stats.energies is None
    plan, stats, _ = run(model, pair, "pitome", published=True, keep=144, energies=True)
    assert [tuple(e.shape) for e in stats.energies] == [(2, n) for n in [PATCHES, *plan.counts[:-1]]]
    assert all(e.dtype == torch.float32 and e.isfinite().all() for e in stats.energies)
    tower = plain.model.vision_tower  # the first block's energy, from the definition
    with torch.no_grad():
        layer = tower.encoder.layers[0]
        x = layer.layer_norm1(tower.pre_layrnorm(tower.embeddings(pair["pixel_values"])))
        keys = layer.self_attn.k_proj(x).unflatten(-1, (2, -1)).mean(2)[:, 1:]
    unit = keys / keys.norm(dim=-1, keepdim=True)
    cos = unit @ unit.mT
    energy = torch.where(cos >= 0.9, cos, torch.exp(cos - 0.9) - 1).mean(-1)
    torch.testing.assert_close(stats.energies[0], energy.float(), atol=1e-5, rtol=1e-4)


def test_stats_follow_each_run(model, one, pair):
    with attach(model, "pitome", keep=144) as handle:
        logits(model, pair)
        both = handle.stats
        logits(model, one)
        assert (both.images, handle.stats.images) == (2, 1)
        assert torch.equal(both.groups[:1], handle.stats.groups)
