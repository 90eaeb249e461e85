"""Encoders alone: nothing lost at keep = all, exact counts, pooling that knows sizes, every patch back, any size."""

from __future__ import annotations

import pytest
import torch
import transformers
from encoders import BLOCKS, BY_MODEL, ENCODERS, GRID, PATCHES, Encoder, pixels
from torch.utils.flop_counter import FlopCounterMode

from pitome_mllm import attach, estimate
from pitome_mllm.families.encoders import ENCODERS as SPECS
from pitome_mllm.families.features import tower_features
from pitome_mllm.methods import Merge, Reducer

CLOSE = dict(atol=1e-6, rtol=1e-6)
QUARTER = PATCHES // 4
rows = pytest.mark.parametrize("row", ENCODERS, ids=str)


class Twins(Reducer):
    """Patches of the upper half of a picture join those below them that are the same."""

    def match(self, metric, r, *, size=None, protected=0, depth=0.0):
        patches = metric.shape[1] - protected
        upper = protected + torch.arange(r).repeat(len(metric), 1)
        return Merge.join(metric.shape[1], upper + patches // 2, upper)


def marks(model) -> list:
    """What is on the modules of a model: classes, attributes and how many hooks; transformers has some of its own."""
    return [(type(m), *vars(m), len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@rows
def test_keeping_all_is_bit_identical_and_nothing_remains(row):
    model, plain, x = row.build(), row.build(), pixels(0, 1)
    expected = row.call(plain, x, output_hidden_states=True)
    for method in ("pitome", "tome", "random"):
        with attach(model, method, keep=1.0) as handle:
            assert_same(row.call(model, x, output_hidden_states=True), expected)
            hidden = torch.rand(2, row.protected + PATCHES, 3)
            assert torch.equal(handle.unmerge(hidden), hidden)
            handle.update(keep=QUARTER)
            row.call(model, x)
            with handle.using(None):
                assert_same(row.call(model, x, output_hidden_states=True), expected)
    assert marks(model) == marks(plain)
    assert_same(row.call(model, x, output_hidden_states=True), expected)


def without_positions(model):
    """The model with all patches at one place, so that equal ones stay equal."""
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if ("position" in name and "text" not in name and "ids" not in name) or name.endswith("inv_freq"):
            weight.data.zero_()
    return model


@rows
def test_a_token_counts_as_often_as_its_patches(row):
    """Merging equal patches changes nothing: not attention, not pooling, not what cross-attention reads."""
    model, plain = without_positions(row.build()), without_positions(row.build())
    x = pixels(0, 1)
    x[:, :, x.shape[2] // 2 :] = x[:, :, : x.shape[2] // 2]
    expected = row.call(plain, x)
    for place in ("mid", "end"):
        counts, left = [PATCHES] * 2 + [PATCHES * 3 // 4] * (BLOCKS - 2), row.protected + PATCHES * 3 // 4
        for proportional in (True, False):
            with attach(model, Twins(), counts=counts, place=place, proportional_attention=proportional) as handle:
                seen = row.call(model, x)
                assert (handle.stats.sizes == 2).sum(1).eq(PATCHES // 4).all()
                seen = {name: handle.unmerge(y) if y.shape[1:2] == (left,) else y for name, y in seen.items()}
            far = max(float((y - expected[name]).abs().max()) for name, y in seen.items())
            assert far < 1e-6 if proportional else far > 1e-3


@rows
def test_a_quarter_is_exact_and_rows_stand_alone(row):
    model, x = row.build(), pixels(0, 1, 2)
    with attach(model, "pitome", published=True, keep=QUARTER) as handle:
        together, stats = row.call(model, x, output_hidden_states=True), handle.stats
        assert stats.counts == handle.plan.counts and stats.counts[-1] == QUARTER == handle.plan.keep
        widths = [state.shape[1] for name, state in together.items() if name.startswith("hidden")]
        assert widths[:7] == [row.protected + n for n in (PATCHES, *stats.counts)] or not widths
        protected = torch.arange(row.protected).repeat(3, 1)
        assert all(torch.equal(merge.group[:, : row.protected], protected) for merge in stats.merges)
        for i in range(3):
            row.call(model, x[i : i + 1])
            assert torch.equal(handle.stats.groups[0], stats.groups[i])
        assert stats.sizes.sum(1).eq(PATCHES).all()


@pytest.mark.parametrize("name", ["CLIPVisionModel", "SiglipVisionModel", "Dinov2Model", "ViTForImageClassification"])
@pytest.mark.parametrize(
    "settings", [{"keep": 0.25}, {"ratio": 0.8}, {"keep": 40, "schedule": "early"}, {"keep": 36, "merges": 3}], ids=str
)
def test_outputs_of_rows_and_of_settings(name, settings):
    row = BY_MODEL[name]
    model, x = row.build(), pixels(0, 1)
    with attach(model, **settings) as handle:
        assert handle.plan.where == "tower" and handle.plan.calibration == "none"
        together, groups = row.call(model, x), handle.stats.groups
        for i in range(2):
            for key, value in row.call(model, x[i : i + 1]).items():
                assert torch.equal(handle.stats.groups[0], groups[i])
                torch.testing.assert_close(value[0], together[key][i], **CLOSE)


SIZED = {"CLIPVisionModel": True, "SiglipModel": True, "ViTForImageClassification": True, "DeiTModel": True}
SIZED |= {"ViTMAEModel": True, "BlipVisionModel": True, "Blip2VisionModel": True, "Dinov2ForImageClassification": False}
SIZED |= {"Dinov2WithRegistersModel": False, "DINOv3ViTModel": False}


@pytest.mark.parametrize("name,flag", SIZED.items())
def test_pictures_of_another_size(name, flag):
    """The grid is that of the call: keep as a share is one of it, and a count that it lacks is refused."""
    row, options = BY_MODEL[name], {"interpolate_pos_encoding": True} if flag else {}
    model, plain, x = row.build(), row.build(), pixels(0, 1, side=(64, 80))
    patches = 16 * 20
    with attach(model, keep=1.0) as handle:
        assert_same(row.call(model, x, **options), row.call(plain, x, **options))
        handle.update(keep=0.25)
        row.call(model, x, **options)
        assert handle.plan.geometry.patches == PATCHES and handle.stats.plan.geometry.grid == (16, 20)
        assert handle.stats.tokens_after == patches // 4 and handle.stats.groups.shape == (2, patches)
        assert handle.unmerge(torch.rand(2, row.protected + patches // 4, 5)).shape[1] == row.protected + patches
        handle.update(keep=PATCHES)
        with pytest.raises(ValueError, match=f"keep={PATCHES}"):
            row.call(model, pixels(0, side=(16, 16)), **options)
        with pytest.raises(RuntimeError, match="size"):  # the model's own words
            row.call(model, pixels(0, side=(2, 16)), **options)


def test_rotary_positions_are_those_of_median_patches():
    row, seen = BY_MODEL["DINOv3ViTModel"], []
    model, x = row.build(), pixels(0, 1)
    handle = attach(model, "pitome", published=True, keep=QUARTER)
    for layer in model.model.layer:
        layer.attention.register_forward_pre_hook(lambda *a: seen.append(a[2]["position_embeddings"]), with_kwargs=True)
    row.call(model, x)
    tables = model.rope_embeddings(x)
    group = torch.arange(PATCHES).repeat(2, 1)
    for given, merge in zip(seen, (None, *handle.stats.merges)):
        if merge is not None:
            group = (merge.group[:, row.protected :] - row.protected).gather(1, group)
        for i in range(2):
            patches = [(group[i] == token).nonzero()[:, 0] for token in range(int(group.max()) + 1)]
            median = torch.stack([members[(len(members) - 1) // 2] for members in patches])
            for table, own in zip(tables, given):
                assert torch.equal(own if merge is None else own[i, 0], table[median])
    with pytest.raises(ValueError, match="no rotary position"):
        handle.update(method="dct", keep=QUARTER)


def test_a_reader_is_told_of_the_towers_own_tensor_only(caplog):
    row = BY_MODEL["Blip2ForImageTextRetrieval"]
    model, masks = row.build(), []
    handle = attach(model, keep=QUARTER)
    model.qformer.encoder.layer[0].crossattention.attention.register_forward_pre_hook(
        lambda m, a, k: masks.append(k["encoder_attention_mask"]), with_kwargs=True
    )
    with handle.using(proportional_attention=False):
        row.call(model, pixels(0, 1))
    assert masks.pop() is None and not caplog.text
    row.call(model, pixels(0, 1))
    assert masks[0].shape[-1] == 1 + QUARTER and masks[0].max() > 0
    with torch.no_grad():
        states = model.vision_model(pixels(0)).last_hidden_state
        mask = torch.ones(states.shape[:2], dtype=torch.long)
        for given in (states, states.clone()):
            model.qformer(model.query_tokens, encoder_hidden_states=given, encoder_attention_mask=mask)
    assert masks[-2].max() > 0 and masks[-1] is None and "hand on the tower's last_hidden_state" in caplog.text
    caplog.clear()
    handle.update(keep=1.0)
    row.call(model, pixels(0, 1, side=(8, 8)), interpolate_pos_encoding=True)  # smaller, and nothing merges
    assert not caplog.text


@pytest.mark.parametrize(
    "name", ["CLIPModel", "SiglipModel", "DeiTForImageClassification", "Dinov2Model", "DINOv3ViTModel"]
)
def test_the_estimate_counts_what_runs(name):
    row = BY_MODEL[name]
    model, x = row.build(attn_implementation="eager"), pixels(0)
    model.set_attn_implementation("eager")  # the counter does not see into other kernels
    tower = model.get_submodule(SPECS[name].tower)
    for method in (None, "pitome"):
        settings = {} if method is None else {"keep": QUARTER}
        with attach(model, method, keep=settings.get("keep", 1.0)) as handle:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                tower(x)
            own = estimate(model, method, **settings)
            assert own.flops == pytest.approx(counter.get_total_flops(), rel=1e-4)
            assert "KV" not in handle.summary() and "GFLOPs" in handle.summary()


def test_tower_features_are_the_towers_own():
    row = BY_MODEL["Dinov2ForImageClassification"]
    model, x = row.build(), pixels(0, 1)
    with attach(model, keep=QUARTER) as handle:
        found = tower_features(model, x)
        assert torch.equal(found, row.call(model.dinov2, x)["last_hidden_state"])  # not scaled for a mean
        assert handle.unmerge(found).shape == (2, 1 + PATCHES, 64)


REFUSED = [
    ("CLIPModel", {"where": "projector"}, "where='projector' is not possible .*: an encoder alone has no projector"),
    ("ViTModel", {"where": "packed"}, "an encoder alone has no projector"),
    ("CLIPModel", {"calibration": "size"}, "calibration='size' is not possible: an encoder alone has no LLM"),
    ("CLIPModel", {"logits": "caller"}, "an encoder alone has no LLM"),
    ("ViTModel", {"metric": "projected"}, "metric='projected'"),
]


@pytest.mark.parametrize("name,settings,said", REFUSED)
def test_settings_without_a_meaning_are_refused(name, settings, said):
    model, plain = BY_MODEL[name].build(), BY_MODEL[name].build()
    with pytest.raises(ValueError, match=said):
        attach(model, keep=QUARTER, **settings)
    assert marks(model) == marks(plain)


def test_models_that_cannot_merge_say_why():
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    beit = transformers.BeitModel(transformers.BeitConfig(**sizes, image_size=16, patch_size=8))
    with pytest.raises(ValueError, match="unsupported model BeitModel: .* bias for every pair"):
        attach(beit, keep=1)
    siglip2 = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**sizes, num_patches=4, patch_size=8))
    with pytest.raises(ValueError, match="load as SiglipModel"):
        attach(siglip2, keep=1)
    decoder = {f"decoder_{name}": size for name, size in sizes.items()}
    mae = transformers.ViTMAEConfig(**sizes, **decoder, image_size=16, patch_size=8, mask_ratio=0.0)
    with pytest.raises(ValueError, match=r"attach to the encoder, model\.vit"):
        attach(transformers.ViTMAEForPreTraining(mae), keep=1)
    with pytest.raises(ValueError, match=r"mask_ratio=0.75 .* load with mask_ratio=0\.0"):
        attach(BY_MODEL["ViTMAEModel"].build(mask_ratio=0.75), keep=1)


def test_a_scaled_picture_has_its_own_order_of_patches():
    """ViT-MAE takes patches in the order of a noise, which is one of the whole picture's."""
    row, x = BY_MODEL["ViTMAEModel"], pixels(0, 1)
    model, plain = row.build(), row.build()
    small = torch.nn.functional.interpolate(x.float(), scale_factor=0.5, mode="bicubic", antialias=True).double()
    expected = row.call(plain, small, interpolate_pos_encoding=True)["last_hidden_state"]
    with attach(model, "downsample", keep=QUARTER) as handle:
        for hidden in (row.call(model, x)["last_hidden_state"], model(x).last_hidden_state):
            torch.testing.assert_close(hidden, expected, **CLOSE)
        assert handle.unmerge(hidden).shape[1] == 1 + PATCHES


def test_calls_that_cannot_merge_say_why():
    row = BY_MODEL["ViTModel"]
    model, x = row.build(), pixels(0)
    handle = attach(model, keep=QUARTER)
    with pytest.raises(ValueError, match="call the model first"):
        handle.unmerge(torch.rand(1, 37, 2))
    with pytest.raises(ValueError, match="attention_mask hides tokens"):
        model(x, attention_mask=torch.ones(1, 1 + PATCHES))
    row.call(model, x)
    with pytest.raises(ValueError, match=r"tokens \(1, 36\), the run left \(1, 37\)"):
        handle.unmerge(torch.rand(1, 36, 2))
    handle.update(method="dct", keep=QUARTER)
    row.call(model, x)
    with pytest.raises(ValueError, match="has no groups"):
        handle.unmerge(torch.rand(1, 37, 2))


def test_every_row_of_the_package_is_tested():
    assert {row.model for row in ENCODERS} == set(SPECS)
    assert GRID**2 == PATCHES and all(isinstance(row, Encoder) for row in ENCODERS)
