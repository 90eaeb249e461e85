"""What callers hand in or hold on to keeps meaning what it means on the plain model: callbacks, caches, features."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from checks import logits, new_ids
from models import BEFORE_518, CACHE, QUESTION, build, picture
from transformers import LogitsProcessorList, StoppingCriteriaList

from pitome_mllm import attach, get_method

NEEDS_FEATURES = pytest.mark.skipif(BEFORE_518, reason="before 5.18 forward() takes no encoded features")
NEXT = torch.tensor([[7, 8, 9]])


@pytest.mark.parametrize("beams", [1, 3])
def test_stopping_criteria_see_the_callers_prompt(model, one, beams):
    width, seen = one["input_ids"].shape[1], []

    def third(ids, scores, **_):
        seen.append(ids.clone())
        return torch.full((len(ids),), ids.shape[1] - width >= 3)

    with attach(model, "pitome", published=True, keep=144):
        options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
        out = model.generate(**one, **options, stopping_criteria=StoppingCriteriaList([third]))
    assert out.shape[1] == width + 3
    assert all(torch.equal(ids[:, :width], one["input_ids"].expand(len(ids), -1)) for ids in seen)


def test_logits_processors_see_the_callers_prompt(model, one):
    width, seen = one["input_ids"].shape[1], []

    def third_token_is_five(ids, scores):
        seen.append(ids.shape[1] - width)
        if ids.shape[1] - width == 2:
            scores = scores.masked_fill(torch.arange(scores.shape[1]) != 5, -torch.inf)
        return scores

    with attach(model, "pitome", published=True, keep=144):
        ids = new_ids(model, one, 4, logits_processor=LogitsProcessorList([third_token_is_five]))
    assert seen == [0, 1, 2, 3] and ids[0][2] == 5


def test_allowed_tokens_see_the_callers_prompt(model, pair):
    width, seen = pair["input_ids"].shape[1], []

    def allowed(row, ids):
        seen.append((row, ids.clone()))
        return [5 + row]

    with attach(model, "pitome", published=True, keep=144):
        assert new_ids(model, pair, 2, prefix_allowed_tokens_fn=allowed) == [[5, 5], [6, 6]]
    assert all(torch.equal(ids[:width], pair["input_ids"][row]) for row, ids in seen)


@NEEDS_FEATURES
@pytest.mark.parametrize("told", [{"calibration": "distance"}, {"calibration": "size"}], ids=str)
def test_features_of_other_pictures_get_no_positions_and_no_sizes(model, process, one, told):
    """What the LLM is told needs the pictures themselves; features may come from any earlier run."""
    other = process(images=[picture(1)], text=[QUESTION], return_tensors="pt")
    text = {key: value for key, value in one.items() if key != "pixel_values"}
    with attach(model, "pitome", published=True, keep=144, **told) as handle, torch.no_grad():
        features = model.model.get_image_features(one["pixel_values"], return_dict=True)
        model.model.get_image_features(other["pixel_values"], return_dict=True)
        with pytest.raises(ValueError, match="mm_encoder_outputs"):
            model(**text, mm_encoder_outputs={"image": features})
        handle.update(calibration="none")
        expected = model(**one).logits
        assert torch.equal(model(**text, mm_encoder_outputs={"image": features}).logits, expected)


@pytest.mark.parametrize("change", ["plain", "all", "compact"])
def test_a_cache_goes_on_in_the_positions_it_was_filled_with(model, one, change):
    mask = torch.ones(1, one["input_ids"].shape[1] + 3, dtype=torch.long)
    with attach(model, "pitome", published=True, keep=144, calibration="distance") as handle, torch.no_grad():
        cache = model(**one, use_cache=True)[CACHE]
        twin = copy.deepcopy(cache)
        expected = model(input_ids=NEXT, **{CACHE: cache}, attention_mask=mask).logits
        settings = {"all": {"keep": 1.0}, "compact": {"calibration": "none"}}.get(change)
        with handle.using(**settings) if settings else handle.using(None):
            seen = model(input_ids=NEXT, **{CACHE: twin}, attention_mask=mask).logits
    assert torch.equal(seen, expected)


def test_a_repeated_cache_goes_on(model, one):
    mask = torch.ones(1, one["input_ids"].shape[1] + 3, dtype=torch.long)
    with attach(model, "pitome", published=True, keep=144), torch.no_grad():
        cache = model(**one, use_cache=True)[CACHE]
        twin = copy.deepcopy(cache)
        expected = model(input_ids=NEXT, **{CACHE: twin}, attention_mask=mask).logits
        cache.batch_repeat_interleave(2)
        seen = model(input_ids=NEXT.repeat(2, 1), **{CACHE: cache}, attention_mask=mask.repeat(2, 1)).logits
    torch.testing.assert_close(seen, expected.repeat(2, 1, 1), atol=1e-5, rtol=1e-5)


def test_the_model_may_be_called_inside_generate(model, one):
    """Contrastive decoding and the like: a callback that runs the same model on a prompt of its own."""
    seen = []

    def look_again(ids, scores):
        seen.append(logits(model, one)[:, -1])
        return scores

    with attach(model, "pitome", published=True, keep=144):
        expected, alone = new_ids(model, one, 3), logits(model, one)[:, -1]
        assert new_ids(model, one, 3, logits_processor=LogitsProcessorList([look_again])) == expected
    assert len(seen) == 3 and all(torch.equal(row, alone) for row in seen)


def test_a_max_length_within_the_prompt_names_the_callers_numbers(model, one):
    with attach(model, "pitome", published=True, keep=144), pytest.raises(ValueError, match="100.*584"):
        model.generate(**one, max_length=100)


@pytest.mark.parametrize(
    "settings,said",
    [
        ({"where": 3}, "where"),
        ({"calibration": True}, "calibration"),
        ({"schedule": 1.5}, "schedule"),
        ({"weighted": "no"}, "weighted"),
        ({"proportional_attention": "off"}, "proportional_attention"),
        ({"energies": 1}, "energies"),
        ({"method": ["pitome"]}, "pitome"),
        ({"where": "both", "tower_keep": 0}, "tower_keep=0"),
        ({"method": "pitome-llava", "early": "tome"}, "early"),
        ({"method": "pitome-llava", "switch": "x"}, "switch"),
    ],
)
def test_settings_of_the_wrong_kind_are_refused(model, settings, said):
    with pytest.raises(ValueError, match=said):
        attach(model, **{"keep": 144, **settings})
    assert "_pitome" not in vars(model)


def test_a_new_place_forgets_the_tokens_of_the_tower(model):
    with attach(model, keep=72, where="both", tower_keep=200) as handle:
        with handle.using(where="tower"):
            assert handle.plan.keep == 72 and not handle.plan.projector_counts
        assert handle.plan.counts[-1] == 200


def test_a_tower_asked_for_tuples_says_so(model, one):
    with attach(model, keep=144), pytest.raises(ValueError, match="return_dict"):
        model.model.vision_tower(one["pixel_values"], return_dict=False)


def test_layers_of_a_derived_class_merge(one):
    model = build()
    for layer in model.model.vision_tower.encoder.layers:
        layer.__class__ = type("Own", (type(layer),), {})
    with attach(model, "pitome", published=True, keep=144) as handle:
        logits(model, one)
        assert handle.stats.tokens_after == 144
    assert all(type(layer).__name__ == "Own" for layer in model.model.vision_tower.encoder.layers)


def test_stats_of_a_worker_are_its_own(model, one):
    seen = []
    with attach(model, keep=144) as handle:
        thread = threading.Thread(target=lambda: (logits(model, one), seen.append(handle.stats)))
        thread.start()
        thread.join()
        assert handle.stats is None and seen[0].tokens_after == 144


def test_a_reducer_instance_brings_its_own_options(model):
    with pytest.raises(ValueError, match="margin"):
        attach(model, get_method("pitome"), keep=144, margin=0.5)
