"""Models that have no row: tried on a small picture, then merged as others, or refused with what did not fit."""

from __future__ import annotations

from functools import wraps

import pytest
import torch
from checks import logits, new_ids
from families import BY_TITLE as OTHERS
from families import QUESTIONS, TWO_PICTURES, pictures
from packed import PACKED

from pitome_mllm import attach
from pitome_mllm.attach import Attachment
from pitome_mllm.families import FAMILIES
from pitome_mllm.methods import UserError

BY_TITLE = {family.title: family for family in PACKED}


@pytest.fixture
def rowless(monkeypatch):
    """A function that gives a model of a family, whose row is gone."""

    def make(title):
        family = BY_TITLE[title]
        monkeypatch.delitem(FAMILIES, family.model, raising=False)
        return family, family.build()

    return make


@pytest.mark.parametrize("title", ["Qwen3-VL", "InternVL", "Mistral Small (Mistral 3)"])
def test_a_model_without_a_row_merges_as_with_one(title, rowless):
    """Deepstack, several axes, tiles, ends of rows: all of that is found in the model."""
    family = BY_TITLE[title]
    inputs = family.process([(TWO_PICTURES, pictures(1, 2)), (QUESTIONS[0], pictures(0))])
    with attach(model := family.build(), keep=0.25) as handle:
        expected, answer, lengths = logits(model, inputs), new_ids(model, inputs), handle.stats.lengths
    _, model = rowless(title)
    model.train()
    with attach(model, keep=0.25) as handle:
        assert not handle.family.known and handle.stats is None and model.training
        assert "small" not in repr(handle) and handle.plan.available == handle.geometry.available > handle.plan.keep
        model.eval()
        assert torch.equal(logits(model, inputs), expected) and new_ids(model, inputs) == answer
        assert handle.stats.lengths == lengths


def _two_pictures(model):
    own = type(model.model).get_image_features

    def features(self, *args, **kwargs):
        output = own(self, *args, **kwargs)
        output.pooler_output = torch.cat([output.pooler_output] * 2)
        return output

    return features


def _no_features(model):
    def features(self, pixel_values, shapes, **kwargs):
        raise AssertionError("never called without shapes")

    return features


@pytest.mark.parametrize(
    "change,words", [(_two_pictures, r"gave \[\(16, 64\), \(16, 64\)\]"), (_no_features, "shapes")]
)
def test_a_model_that_does_otherwise_is_refused_with_what_did_not_fit(change, words, rowless, monkeypatch):
    _, model = rowless("InternVL")
    monkeypatch.setattr(type(model.model), "get_image_features", change(model))
    with pytest.raises(UserError, match=f"unsupported model InternVL.*small picture.*{words}.*CONTRIBUTING"):
        attach(model, keep=0.25)
    assert Attachment.of(model) is None and "generate" not in vars(model)
    assert not any("_pitome" in vars(module) for module in model.modules())


def test_axes_that_count_something_else_are_refused(rowless, monkeypatch):
    _, model = rowless("Qwen2.5-VL")
    own = type(model.model).get_rope_index

    @wraps(own)
    def get_rope_index(self, *args, **kwargs):
        ids, deltas = own(self, *args, **kwargs)
        return ids[[1, 2, 0]], deltas

    monkeypatch.setattr(type(model.model), "get_rope_index", get_rope_index)
    with pytest.raises(UserError, match="in 3 axes are not time, row and column"):
        attach(model, keep=0.25)


def test_rows_run_nothing_at_attach():
    """What a row says needs no trial, so that attaching takes no more time than putting hooks on."""
    for family in PACKED:
        model = family.build()
        model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
        model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
        attach(model, keep=0.25).remove()


@pytest.mark.parametrize("title", ["LLaVA-1.5", "PaliGemma", "LLaVA-NeXT (1.6)", "Video-LLaVA"])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's processor
def test_a_tower_of_a_kind_without_a_row_is_merged_behind(title, monkeypatch):
    monkeypatch.setattr("pitome_mllm.families.geometry.TOWER_OF_CONFIG", {})
    family = OTHERS[title]
    model, inputs = family.build(), family.process([(QUESTIONS[0], pictures(0))])
    inputs.pop("labels", None)
    plain = logits(model, inputs)
    with attach(model, keep=1.0) as handle:
        assert handle.plan.where == "packed" and torch.equal(logits(model, inputs), plain)
        handle.update(keep=0.25)
        seen = logits(model, inputs)
        assert new_ids(model, inputs, 1) == [[int(seen[0, -1].argmax())]]
        (group,), (left,) = handle.stats.groups, handle.stats.lengths
        assert seen.shape[1] == plain.shape[1] - len(group) + left and left == round(int((group >= 0).sum()) / 4)
