"""Attaching, updating and removing: nothing stays behind, nothing leaks elsewhere, and mistakes are explained."""

from __future__ import annotations

import copy
import json
import pickle
import re

import pytest
import torch
from checks import assert_same_modules, assert_works, is_plain, logits, new_ids
from conftest import attributes
from models import PATCHES, build, build_text_model
from torch import nn
from transformers import LlavaForConditionalGeneration

from pitome_mllm import METHODS, attach, estimate
from pitome_mllm.attach import Attachment
from pitome_mllm.errors import UserError
from pitome_mllm.settings import DEFAULT_METHOD

pytestmark = pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids`")

# ---- keep = all is the plain model -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"keep": PATCHES}, {"keep": 1.0}, {"keep": 1.0, "merges": 2}, {"ratio": 1.0}, {"counts": [PATCHES] * 6}],
)
@pytest.mark.parametrize("method", ["pitome", "tome", "pitome-llava"])
def test_keeping_all_is_bit_identical(model, plain, pair, settings, method):
    with attach(model, method, **settings):
        assert torch.equal(logits(model, pair), logits(plain, pair))


@pytest.mark.parametrize("method", list(METHODS))
def test_keeping_all_is_bit_identical_with_every_method(model, plain, pair, method):
    with attach(model, method, keep=PATCHES):
        assert torch.equal(logits(model, pair), logits(plain, pair))


@pytest.mark.parametrize("where", ["tower", "projector", "both"])
@pytest.mark.parametrize("calibration", ["none", "size", "distance"])
def test_keeping_all_is_bit_identical_at_every_place(model, plain, pair, where, calibration):
    with attach(model, keep=PATCHES, where=where, calibration=calibration):
        assert torch.equal(logits(model, pair), logits(plain, pair))
        assert new_ids(model, pair) == new_ids(plain, pair)


def test_keeping_all_of_feature_selection_full(one):
    from models import QUESTION, picture, processor

    options = {"strategy": "full", "layers": 3}
    inputs = processor(strategy="full")(images=[picture(0)], text=QUESTION, return_tensors="pt")
    model, plain = build(**options), build(**options)
    with attach(model, keep=1.0) as handle:
        assert handle.plan.available == PATCHES + 1
        assert torch.equal(logits(model, inputs), logits(plain, inputs))


# ---- remove() leaves nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["tower", "projector", "both"])
@pytest.mark.parametrize("ran_before", [False, True])
def test_remove_restores_everything(model, one, where, ran_before):
    twin = build()
    new_ids(twin, one)
    if ran_before:
        new_ids(model, one)
    handle = attach(model, keep=144, where=where)
    new_ids(model, one)
    handle.update(keep=72, method="tome")
    logits(model, one)
    handle.remove()
    assert is_plain(model, twin, one)
    new_ids(model, one)
    assert_same_modules(model, twin)
    assert Attachment.of(model) is None


def test_remove_before_any_run(model):
    attach(model, keep=144).remove()
    assert_same_modules(model, build())


def test_context_manager_removes_even_after_an_error(model, plain, one):
    with pytest.raises(KeyError):
        with attach(model, keep=144) as handle:
            assert Attachment.of(model) is handle
            logits(model, one)
            raise KeyError("the caller's own")
    assert Attachment.of(model) is None
    assert is_plain(model, plain, one)


def test_remove_twice_is_harmless(model, plain, one):
    handle = attach(model, keep=144)
    handle.remove()
    handle.remove()
    assert is_plain(model, plain, one)


def test_attach_again_after_remove(model, plain, one):
    attach(model, keep=72).remove()
    with attach(model, "pitome", published=True, keep=144) as handle:
        assert_works(handle, model, plain, one)


def test_a_class_derived_from_a_known_one_merges(model, plain, one):
    model.__class__ = type("Mine", (type(model),), {})
    assert_works(attach(model, "pitome", published=True, keep=144), model, plain, one)


def test_update_replans(model, plain, one):
    handle = attach(model, "pitome", published=True, keep=144)
    assert_works(handle, model, plain, one)
    handle.update(keep=72, method="tome")
    assert (handle.plan.keep, handle.plan.method) == (72, "tome")
    assert_works(handle, model, plain, one, "tome")
    handle.update(ratio=0.9)
    assert handle.plan.keep == handle.plan.counts[-1] != 72
    assert_works(handle, model, plain, one, "tome")


def test_update_and_using_take_the_method_as_attach_does(model, caplog):
    with attach(model, "pitome", keep=144, where="both") as handle:
        handle.update("tome")
        assert (handle.plan.method, handle.plan.keep) == ("tome", 144)
        with handle.using("dct", keep=72):
            assert (handle.plan.method, handle.plan.keep) == ("dct", 72)
        handle.update(None)
        assert handle.plan.method == DEFAULT_METHOD
        for wrong in ((None, "tome"), ("tome", "dct")):
            with pytest.raises(UserError, match="call using"), handle.using(*wrong):
                pass
        assert not caplog.records
        handle.update(where=None, ratio=0.9)
        handle.update(keep=144)
        assert "now merge where='both', no longer where='tower'" in caplog.text


def test_summaries_are_a_few_lines(model, one):
    with attach(model, "pitome", keep=144, where="both") as handle:
        assert "last run: none" in handle.summary()
        logits(model, one)
        about, counts, saved, last = handle.summary().splitlines()
        assert "pitome (keep=144 of 576, both" in about and counts.startswith("patch tokens, merge by merge: 576, ")
        merged, plain = estimate(model, "pitome", keep=144, where="both"), estimate(model)
        assert f"{merged.flops / 1e9:.4g} of {plain.flops / 1e9:.4g} GFLOPs" in saved
        largest, alone = int(handle.stats.sizes.max()), int((handle.stats.sizes == 1).sum())
        assert (
            last.removeprefix("last run: ")
            == repr(handle.stats)
            == (
                f"Stats(pitome, images: 1, visual tokens: 144 of 576, largest group: {largest} patches, alone: {alone})"
            )
        )
        assert handle._repr_html_() == f"<pre>{handle.summary()}</pre>"
        with handle.using("dct", keep=72):
            logits(model, one)
            assert repr(handle.stats) == "Stats(dct, images: 1, visual tokens: 72 of 576)"
        with handle.using(None):
            assert handle.summary().endswith("the plain model")


def test_another_place_forgets_what_the_tower_keeps(model):
    """Whether the place is the caller's, or changes with what is asked for besides."""
    for change in ({"where": "tower"}, {"published": True}, {"method": "pitome-llava"}, {"ratio": 0.9}):
        with attach(model, keep=144) as handle:
            handle.update(tower_keep=300)
            assert handle.plan.counts[-1] == 300
            handle.update(**change)
            assert handle.plan.where == "tower" and handle.settings.tower_keep is None
    with attach(model, keep=144) as handle:
        handle.update(tower_keep=300)
        handle.update(keep=72)
        assert handle.plan.counts[-1] == 300 and handle.plan.keep == 72
        with pytest.raises(ValueError, match="tower_keep=300 goes with where='both'"):
            handle.update(published=True, tower_keep=300)


def test_a_plain_run_before_attaching_changes_nothing(model, plain, one):
    new_ids(model, one)
    with attach(model, "pitome", published=True, keep=144) as handle:
        assert_works(handle, model, plain, one)


# ---- copies, pickles, files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ran_before", [False, True])
def test_a_deepcopy_merges_on_its_own(model, plain, one, ran_before):
    handle = attach(model, "pitome", published=True, keep=144)
    if ran_before:
        logits(model, one)
    twin = copy.deepcopy(model)
    other = Attachment.of(twin)
    assert other is not None and other is not handle
    assert_works(other, twin, plain, one)
    other.update(keep=72)
    assert (handle.plan.keep, other.plan.keep) == (144, 72)
    assert_works(handle, model, plain, one)
    assert_works(other, twin, plain, one)
    handle.remove()
    assert is_plain(model, plain, one)
    assert_works(other, twin, plain, one)
    other.remove()
    assert is_plain(twin, plain, one)
    assert_same_modules(twin, model)


def test_a_pickled_model_never_merges_by_half(model, plain, one):
    """Pickling while attached works wholly or is refused; once removed it is a plain model's."""
    handle = attach(model, "pitome", keep=144)
    try:
        twin = pickle.loads(pickle.dumps(model))
    except (pickle.PicklingError, ValueError):
        pass
    else:
        assert_works(Attachment.of(twin), twin, plain, one)
        assert new_ids(twin, one) == new_ids(model, one)
    handle.remove()
    twin = pickle.loads(pickle.dumps(model))
    assert_same_modules(twin, model)
    assert is_plain(twin, plain, one)


def test_state_dict_is_the_plain_one(model, plain):
    attach(model, keep=144)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    model.load_state_dict(build(seed=2).state_dict())


def test_save_pretrained_writes_a_plain_model(model, plain, one, tmp_path):
    build().save_pretrained(tmp_path / "plain")
    with attach(model, keep=144):
        logits(model, one)
        model.save_pretrained(tmp_path / "attached")
    configs = [json.loads((tmp_path / side / "config.json").read_text()) for side in ("plain", "attached")]
    assert configs[0] == configs[1]
    assert configs[1]["architectures"] == ["LlavaForConditionalGeneration"]
    files = [{f.name for f in (tmp_path / side).iterdir()} for side in ("plain", "attached")]
    assert files[0] == files[1]
    assert is_plain(LlavaForConditionalGeneration.from_pretrained(tmp_path / "attached").eval(), plain, one)


# ---- accelerate ------------------------------------------------------------------------------------------------------


def hook_all(model):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for module in list(model.modules()):
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))


def unhook_all(model):
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(model, recurse=True)


@pytest.mark.parametrize("where", ["tower", "both"])
@pytest.mark.parametrize("hooks_first", [True, False])
@pytest.mark.parametrize("unhook_first", [True, False])
def test_accelerate_hooks_in_any_order(model, plain, one, where, hooks_first, unhook_first):
    twin = build()
    hook_all(twin)
    logits(twin, one)
    unhook_all(twin)
    if hooks_first:
        hook_all(model)
    handle = attach(model, "pitome", published=True, keep=144, where=where)
    if not hooks_first:
        logits(model, one)
        hook_all(model)
    first = logits(model, one)
    assert handle.stats.tokens_after == 144 and first.shape[1] == one.input_ids.shape[1] - PATCHES + 144
    if where == "tower":
        assert_works(handle, model, plain, one)
    if unhook_first:
        unhook_all(model)
        assert torch.equal(logits(model, one), first)
        handle.remove()
    else:
        handle.remove()
        assert is_plain(model, plain, one)
        unhook_all(model)
    assert is_plain(model, plain, one)
    assert_same_modules(model, twin)


@pytest.mark.parametrize("offload_first", [True, False])
def test_weights_offloaded_by_accelerate(model, plain, one, offload_first):
    from accelerate import cpu_offload

    if offload_first:
        cpu_offload(model, execution_device=torch.device("cpu"))
    with attach(model, "pitome", published=True, keep=144) as handle:
        if not offload_first:
            cpu_offload(model, execution_device=torch.device("cpu"))
        assert_works(handle, model, plain, one)
        assert new_ids(model, one)[0]
    assert is_plain(model, plain, one)


# ---- two models in one process ---------------------------------------------------------------------------------------


def test_two_models_never_affect_each_other(model, plain, one):
    other, untouched = build(), build()
    handle = attach(model, "pitome", published=True, keep=144)
    before = attach(other, "tome", published=True, keep=72)
    assert_works(handle, model, plain, one)
    assert_works(before, other, plain, one, "tome")
    twin = build()
    assert is_plain(untouched, twin, one)
    assert_same_modules(untouched, twin)
    handle.remove()
    assert_works(before, other, plain, one, "tome")
    assert is_plain(model, plain, one)


def test_nothing_global_is_patched(model, one, patched_by_import):
    assert not patched_by_import
    new_ids(build(), one)
    copy.deepcopy(build())
    own = attributes()  # with what Python, transformers and a compiler keep on their classes once they are used
    with attach(model, keep=144, where="both"):
        new_ids(model, one)
        assert attributes() == own
    assert attributes() == own


# ---- mistakes --------------------------------------------------------------------------------------------------------

WRONG = [  # settings, words that the message must contain
    ({"keep": 0}, ["0", "1"]),
    ({"keep": -3}, ["-3", "1"]),
    ({"keep": 577}, ["577", "576"]),
    ({"keep": 1.5}, ["1.5"]),
    ({"keep": 0.0}, ["0.0"]),
    ({"keep": True}, ["True"]),
    ({"keep": "144"}, ["144"]),
    ({"keep": float("nan")}, ["nan"]),
    ({"keep": 2, "where": "tower"}, ["2", "9", "576"]),  # six blocks of at most half reach 9, no fewer
    ({"ratio": 0}, ["0"]),
    ({"ratio": 1.2}, ["1.2"]),
    ({"keep": 144, "ratio": 0.9}, ["keep", "ratio"]),
    ({"keep": 144, "counts": [300, 200, 144, 144, 144, 144]}, ["keep", "counts"]),
    ({"ratio": 0.9, "counts": [300, 200, 144, 144, 144, 144]}, ["ratio", "counts"]),
    ({"counts": [300, 144]}, ["2", "6"]),
    ({"counts": [300, 310, 144, 144, 144, 144]}, ["310"]),
    ({"counts": [100, 100, 100, 100, 100, 100]}, ["100", "288"]),
    ({"ratio": 0.9, "where": "projector"}, ["ratio", "projector", "tower"]),
    ({"ratio": 0.9, "where": "both"}, ["ratio", "both", "tower"]),
    ({"counts": [300] * 6, "where": "projector"}, ["counts", "projector", "tower"]),
    ({"keep": 144, "where": "tower", "tower_keep": 300}, ["tower_keep", "both"]),
    ({"keep": 144, "where": "both", "tower_keep": 100}, ["tower_keep", "100", "144"]),
    ({"keep": 144, "where": "both", "tower_keep": 600}, ["tower_keep", "600", "576"]),
    ({"keep": 144, "where": "llm"}, ["llm", "tower", "projector", "both"]),
    ({"keep": 144, "metric": "key"}, ["key", "keys", "hidden"]),
    ({"keep": 144, "place": "start"}, ["start", "mid", "end"]),
    ({"keep": 144, "order": "random"}, ["random", "reading", "source"]),
    ({"method": "crossget", "keep": 144, "order": "source"}, ["source", "crossget", "reading"]),
    ({"method": "pitome-bsm", "keep": 144, "order": "source"}, ["source", "protect", "reading"]),
    ({"keep": 144, "calibration": "old"}, ["old", "distance", "size", "none"]),
    ({"keep": 144, "positions": "original"}, ["positions", "calibration='distance'"]),
    ({"keep": 144, "llm_size_bias": True}, ["llm_size_bias", "calibration='distance'"]),
    ({"keep": 144, "schedule": "linear"}, ["linear", "equal", "early", "delayed", "last"]),
    ({"keep": 144, "metric": "history"}, ["history", "keys", "hidden", "projected"]),
    ({"method": "pitome", "keep": 144, "smooth": 0.5}, ["smooth", "margin", "protect"]),
    *(({"keep": 144, "merges": merges}, [f"merges={merges!r}", "1", "every"]) for merges in (0, -1, True, "some", 2.5)),
    ({"ratio": 0.9, "merges": 4}, ["ratio", "every block", "merges=4", "keep"]),
    ({"counts": [500, 400, 300, 200, 144, 144], "merges": "every"}, ["counts", "merges='every'", "keep"]),
    ({"keep": 144, "where": "projector", "merges": 4}, ["merges=4", "where='projector'", "leave it out"]),
    ({"keep": 144, "where": "projector", "merges": 0}, ["merges=0", "1", "every"]),
    ({"method": "visionzip", "keep": 144, "merges": 4}, ["merges=4", "visionzip", "one step", "leave it out"]),
    ({"method": "downsample", "keep": 144, "merges": 4}, ["merges=4", "downsample", "one step", "leave it out"]),
    ({"method": "pitom", "keep": 144}, ["pitom", "did you mean", "pitome"]),
    ({"method": "fastv", "keep": 144}, ["fastv", "pitome", "tome"]),
    ({"method": "pitome", "keep": 144, "margn": 0.4}, ["margn", "margin"]),
    ({"method": "tome", "keep": 144, "alpha": 1.0}, ["alpha", "tome"]),
    ({"method": "pitome", "keep": 144, "energy": "softmax"}, ["softmax", "paper", "elu"]),
]


@pytest.mark.parametrize("settings,words", WRONG, ids=[str(settings) for settings, _ in WRONG])
def test_mistakes_are_explained_and_leave_the_model_alone(model, plain, settings, words):
    with pytest.raises(ValueError) as error:
        attach(model, **settings)
    for word in words:
        assert re.search(rf"(?<!\w){re.escape(word)}", str(error.value)), f"{word!r} is not said in: {error.value}"
    assert Attachment.of(model) is None
    assert_same_modules(model, build())


@pytest.mark.parametrize("settings", [{"keep": 0}, {"method": "pitom"}, {"keep": 72, "ratio": 0.9}, {"place": "x"}])
def test_a_failed_update_changes_nothing(model, plain, one, settings):
    handle = attach(model, "pitome", published=True, keep=144)
    with pytest.raises(ValueError):
        handle.update(**settings)
    with pytest.raises(ValueError):
        with handle.using(**settings):
            pass
    assert_works(handle, model, plain, one)
    assert handle.plan.keep == 144


@pytest.mark.parametrize(
    "make",
    [build_text_model, lambda: nn.Linear(2, 2), lambda: build().model.vision_tower.encoder, lambda: "llava-1.5-7b"],
)
def test_unknown_models_are_refused(make):
    thing = make()
    with pytest.raises(ValueError) as error:
        attach(thing, keep=144)
    assert type(thing).__name__ in str(error.value)
    assert "LlavaForConditionalGeneration" in str(error.value)


def test_attaching_twice_is_refused(model, plain, one):
    handle = attach(model, "pitome", published=True, keep=144)
    with pytest.raises(ValueError, match=r"(?s)pitome.*144.*remove\(\)"):
        attach(model, "tome", published=True, keep=72)
    assert Attachment.of(model) is handle
    assert_works(handle, model, plain, one)


def test_a_removed_handle_says_so(model):
    handle = attach(model, keep=144)
    handle.remove()
    with pytest.raises(ValueError, match="remove"):
        handle.update(keep=72)
    with pytest.raises(ValueError, match="remove"):
        with handle.using(keep=72):
            pass
