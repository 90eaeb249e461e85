"""What every method is by default and as published: its place, its counts, what the LLM is told, and its options."""

from __future__ import annotations

import dataclasses

import pytest
from checks import assert_works
from models import build

from pitome_mllm import METHODS, attach, get_method
from pitome_mllm.families import FamilySpec
from pitome_mllm.families.geometry import Geometry
from pitome_mllm.methods.tome import ToMe
from pitome_mllm.plan import make_plan
from pitome_mllm.settings import DEFAULT_METHOD, ONE_STEP, PUBLISHED, STEPS, Settings

CLIP_L = Geometry(grid=(24, 24), class_tokens=1, visible_class_tokens=0, merging_blocks=23, blocks=24)
PACKED = dataclasses.replace(
    CLIP_L, class_tokens=0, family=FamilySpec("x", places=("packed",), unsupported_reason="why")
)
EVERY, FEW = tuple(range(23)), (1, 4, 7, 10, 13, 16)
ONCE = {  # place and metric of methods that reduce in one place, whatever the table
    "visionzip": ("projector", "keys"),
    "prumerge": ("projector", "keys"),
    "prumerge-plus": ("projector", "keys"),
    "divprune": ("projector", "projected"),
    "dart": ("projector", "hidden"),
    "cdpruner": ("projector", "projected"),
    "pool": ("tower", "hidden"),
    "downsample": ("tower", "keys"),
    "random": ("projector", "hidden"),
    "uniform": ("projector", "hidden"),
}


def plan_of(method=None, geometry=CLIP_L, **asked):
    return make_plan(Settings().changed(method=method, **{"keep": 144, **asked}), geometry)


def told(plan):
    return plan.where, plan.metric, plan.weighted, plan.calibration, plan.merging


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ONCE])
def test_methods_that_go_in_steps(method):
    """One table for all by default, one for all as published; a row's own settings hold in both."""
    plan, published = plan_of(method), plan_of(method, published=True)
    own = {"metric": "keys", "weighted": True, **METHODS[method].settings}
    calibration = "none" if method == "dct" else "distance"  # which has no groups
    assert told(published) == ("tower", own["metric"], own["weighted"], "none", EVERY)
    assert (published.counts[-1], published.projector_counts, published.proportional_attention) == (
        144,
        (),
        method != "pitome-llava",
    )
    if method == "pitome-llava":
        assert dataclasses.replace(published, published=False) == plan  # it is what somebody published
    else:
        assert told(plan) == ("both", "hidden", False, calibration, FEW)
        assert (plan.counts[-1], plan.projector_counts[-1]) == (192, 144)
    assert published.reducer == get_method(method)
    assert plan.reducer == get_method(method, **METHODS[method].library)


@pytest.mark.parametrize("method", ONCE)
def test_methods_that_reduce_in_one_place(method):
    plan, published = plan_of(method), plan_of(method, published=True)
    for each, calibration in ((plan, "distance"), (published, "none")):
        assert (each.where, each.metric, each.calibration, each.keep) == (*ONCE[method], calibration, 144)
        if METHODS[method].reducer.once:
            assert len(each.steps) == (method != "downsample")  # which shrinks the picture
    assert plan.reducer == published.reducer == get_method(method)


def test_pitome_as_published_is_the_paper_s():
    plan = plan_of(published=True)
    assert plan.reducer == get_method("pitome", margin=None, alpha=1.0, energy="paper", protect=1.0)
    assert (plan.metric, plan.place, plan.order) == ("keys", "mid", "reading")
    assert plan.weighted and plan.proportional_attention
    assert plan_of().reducer == get_method("pitome", protect=0.5, alpha=0.0, margin=0.6)


def test_every_default_is_a_setting():
    names = {field.name for field in dataclasses.fields(Settings)}
    assert set(PUBLISHED) == set(ONE_STEP) == set(STEPS) <= names
    for method in METHODS.values():
        assert set(method.settings) <= set(PUBLISHED)
        assert set(method.library) <= {field.name for field in dataclasses.fields(method.reducer)}
    assert DEFAULT_METHOD in METHODS


@pytest.mark.parametrize("published", [False, True])
def test_what_the_caller_gives_wins(published):
    asked = {
        "where": "both", "metric": "keys", "weighted": True, "proportional_attention": False, "place": "end",
        "calibration": "size",
    }  # fmt: skip
    plan = plan_of(published=published, margin=0.1, protect=0.75, **asked)
    assert {name: getattr(plan, name) for name in asked} == asked
    assert (plan.reducer.margin, plan.reducer.protect, plan.reducer.alpha) == (0.1, 0.75, float(published))
    assert len(plan_of(published=published, where="tower", merges=4).merging) == 4


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("amount", [{"ratio": 0.9}, {"counts": [500] * 23}], ids=str)
def test_ratio_and_counts_are_of_the_tower(published, amount):
    plan = plan_of(keep=None, published=published, **amount)
    assert (plan.where, plan.projector_counts, len(plan.counts)) == ("tower", (), 23)
    assert plan.metric == ("keys" if published else "hidden")


def test_update_and_using_go_there_and_back(model, plain, one):
    with attach(model, "pitome", keep=144) as handle:
        assert handle.plan.where == "both"
        with handle.using(published=True):
            assert_works(handle, model, plain, one)
        assert handle.plan.where == "both" and not handle.plan.published
        handle.update(published=True)
        assert_works(handle, model, plain, one)
        assert "published" in repr(handle)
        with handle.using(published=False, where="projector"):
            assert (handle.plan.metric, handle.plan.where) == ("hidden", "projector")
        handle.update(method="tome")  # another method as published
        assert_works(handle, model, plain, one, "tome")


def test_a_reducer_goes_by_its_kind_and_has_no_paper():
    assert told(plan_of(ToMe())) == told(plan_of("tome"))
    assert plan_of(get_method("visionzip")).calibration == "distance"
    with pytest.raises(ValueError, match="a Reducer has no paper; choose published=False"):
        plan_of(ToMe(), published=True)


def test_a_family_without_a_tower_place_says_so():
    assert plan_of("tome", PACKED).where == "packed"
    with pytest.raises(ValueError, match=r"tome as published merges where='tower'.*family: why; .*where='packed'"):
        plan_of("tome", PACKED, published=True)
    assert plan_of("tome", PACKED, published=True, where="packed").calibration == "none"


@pytest.mark.parametrize("value", [1, "True", None])
def test_published_is_true_or_false(value):
    with pytest.raises(ValueError, match=f"unknown published {value!r}; choose one of True, False"):
        plan_of(published=value)


def test_what_is_gone_says_what_to_write():
    for make in (get_method, plan_of, lambda name: attach(build(layers=1), name, keep=144)):
        with pytest.raises(
            ValueError, match=r"attach\(model, 'pitome', keep=...\).*protect=0.5, alpha=0.0, margin=0.6"
        ):
            make("pitome-tuned")
