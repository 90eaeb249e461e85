"""What methods get to know beyond keys: class attention, earlier keys, projected features; and a smaller picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from checks import assert_row, logits, new_ids
from models import PATCH, PATCHES, QUESTION, build, picture, processor
from torch import Tensor

from pitome_mllm import METHODS, attach, get_method
from pitome_mllm.hooks import masks
from pitome_mllm.methods import Merge, Reducer

NEEDING_ATTENTION = [name for name, method in METHODS.items() if "attention" in method.reducer.needs]


@dataclass(frozen=True)
class Spy(Reducer):
    """Merges as ToMe does, and remembers what it was given."""

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    seen: list[dict[str, Any]] = field(default_factory=list)

    def match(self, metric: Tensor, r: int, *, attention: Tensor | None = None, **given: Any) -> Merge:
        self.seen.append({"metric": metric, "attention": attention, **given})
        return get_method("tome").match(metric, r, **given)


@torch.no_grad()
def weights(model, inputs, block: int) -> Tensor:
    """Attention weights (B, H, N, N) of a block, from the eager implementation."""
    out = model.model.vision_tower(inputs["pixel_values"], output_attentions=True, return_dict=True)
    return out.attentions[block].float()


@pytest.mark.parametrize("place", ["mid", "end"])
def test_class_attention_is_the_row_of_the_attention_matrix(model, pair, place):
    spy = Spy()
    with attach(model, spy, counts=[576, 576, 400, 400, 400, 400], place=place):
        logits(model, pair)
    expected = weights(build(attention="eager"), pair, 2)[:, :, 0].mean(1)
    torch.testing.assert_close(spy.seen[0]["attention"], expected, atol=1e-6, rtol=1e-4)


def test_in_front_of_the_projector_it_is_that_of_the_last_merging_block(model, pair):
    spy = Spy()
    with attach(model, spy, keep=288, where="projector"):
        logits(model, pair)
    expected = weights(build(attention="eager"), pair, 5)[:, :, 0].mean(1)
    torch.testing.assert_close(spy.seen[0]["attention"], expected, atol=1e-6, rtol=1e-4)


def test_merged_tokens_draw_attention_by_their_size(model, one):
    """After a merge the row holds log(size), and sums to one over what is left."""
    spy = Spy()
    with attach(model, spy, counts=[300, 200, 200, 200, 200, 200]) as handle:
        logits(model, one)
        first = handle.stats.merges[0]
    sizes = first.reduce(torch.ones(1, PATCHES + 1, 1))[1]
    assert sizes.max() > 1
    row = spy.seen[1]["attention"]
    torch.testing.assert_close(row.sum(1), torch.ones(1))
    with attach(model, Spy(plain := []), counts=[300, 200, 200, 200, 200, 200], proportional_attention=False):
        logits(model, one)
    assert (plain[1]["attention"] - row).abs().max() > 1e-6


def test_projected_is_what_the_projector_gives(model, plain, pair):
    spy = Spy()
    with attach(model, spy, keep=144, where="projector", metric="projected") as handle:
        logits(model, pair)
    with torch.no_grad():
        states = plain.model.vision_tower(pair["pixel_values"], output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(spy.seen[0]["metric"], plain.model.multi_modal_projector(states))
    first, *_ = handle.plan.projector_counts
    assert spy.seen[1]["metric"].shape[1] == 1 + first  # the second round projects what the first one left


@pytest.mark.parametrize("method", NEEDING_ATTENTION)
def test_a_tower_without_class_token_lacks_class_attention(method):
    model = build(tower="siglip", strategy="full", feature_layer=-1)
    with pytest.raises(ValueError, match=f"{method} needs the attention of a class token.*choose another"):
        attach(model, method, keep=144)


@pytest.mark.parametrize("where", ["tower", "both"])
def test_projected_exists_in_front_of_the_projector_only(model, where):
    with pytest.raises(ValueError, match="metric='projected'.*choose where='projector'"):
        attach(model, "tome", published=True, keep=144, metric="projected", where=where)


def test_tokens_without_groups_have_no_original_position(model):
    with pytest.raises(ValueError, match="dct has no groups.*calibration='none'"):
        attach(model, "dct", published=True, keep=144, calibration="distance")
    assert {name for name in METHODS if not get_method(name).forms_groups} == {"dct"}


def test_a_method_brings_its_place_and_gives_way(model):
    with attach(model, "visionzip", published=True, keep=144) as handle:
        assert (handle.plan.where, handle.plan.counts[-1], handle.plan.projector_counts) == (
            "projector",
            PATCHES,
            (144,),
        )
        handle.update(method="tome")
        assert handle.plan.where == "tower"
        handle.update(method="divprune")
        assert (handle.plan.where, handle.plan.metric) == ("projector", "projected")
        handle.update(where="tower")
        assert (handle.plan.where, handle.plan.metric) == ("tower", "hidden")
        handle.update(method="tome", ratio=0.9)
        assert handle.plan.where == "tower"


# ---- a smaller picture -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep,grid", [(144, (12, 12)), (288, (16, 18)), (72, (8, 9)), (36, (6, 6)), (1, (1, 1))])
def test_downsample_is_the_plain_model_on_a_smaller_picture(model, plain, pair, keep, grid):
    with attach(model, "downsample", keep=keep) as handle, torch.no_grad():
        features = model.model.get_image_features(pair["pixel_values"], return_dict=True).pooler_output
        small = F.interpolate(pair["pixel_values"], (PATCH * grid[0], PATCH * grid[1]), mode="bicubic", antialias=True)
        tower = plain.model.vision_tower(small, output_hidden_states=True, interpolate_pos_encoding=True)
        expected = plain.model.multi_modal_projector(tower.hidden_states[-2][:, 1:])
        torch.testing.assert_close(torch.stack(list(features)), expected)
        pooled = get_method("pool").match(torch.ones(2, PATCHES, 1), PATCHES - keep, grid=(24, 24))
        assert torch.equal(handle.stats.groups, pooled.group)
        assert handle.stats.sizes.sum().item() == 2 * PATCHES


@pytest.mark.parametrize("settings", [{}, {"calibration": "distance"}, {"calibration": "size"}], ids=str)
def test_downsample_in_a_batch(model, settings):
    images = [picture(0), picture(1), picture(2)]
    text = [QUESTION, "USER: <image> <image> what is there in this picture and that one? ASSISTANT:"]
    batch = processor()(images=images, text=text, padding=True, return_tensors="pt")
    alone = processor()(images=images[:1], text=text[:1], return_tensors="pt")
    with attach(model, "downsample", keep=144, **settings):
        seen = logits(model, batch)
        assert_row(seen[0], logits(model, alone)[0])
        assert new_ids(model, batch)[0] == new_ids(model, alone)[0]


def test_downsample_keeps_all_without_a_trace(model, plain, one):
    with attach(model, "downsample", keep=PATCHES):
        assert torch.equal(logits(model, one), logits(plain, one))


@pytest.mark.parametrize("where", ["projector", "both"])
def test_downsample_happens_before_the_tower(model, where):
    with pytest.raises(ValueError, match=f"downsample.*where='tower'|downsample.*{where}"):
        attach(model, "downsample", keep=144, where=where)


# ---- weight by size --------------------------------------------------------------------------------------------------


def test_a_token_with_the_log_of_its_size_draws_what_its_copies_drew():
    random = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, 5, 8, generator=random)
    keys, values = (torch.randn(1, 2, 3, 8, generator=random) for _ in range(2))
    copies = torch.tensor([0, 0, 0, 1, 2, 2])
    expected = F.scaled_dot_product_attention(query, keys[:, :, copies], values[:, :, copies])
    everything, places = torch.ones(1, 1, 5, 3, dtype=torch.bool), torch.arange(5)[None]
    mask = masks.calibrated_mask(
        everything, places, places[:, :3], torch.tensor([[3.0, 0.0, 2.0]]), None, torch.float32
    )
    torch.testing.assert_close(F.scaled_dot_product_attention(query, keys, values, attn_mask=mask), expected)


def test_the_mask_is_causal_and_hides_padding():
    places = torch.arange(4)
    seen = masks.seen(places, places, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), None)[:, 0]
    assert seen[1].tolist() == torch.ones(4, 4).tril().bool().tolist()
    assert seen[0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]


def test_projections_are_listened_to_once_somebody_asks(model, one):
    key = model.model.vision_tower.encoder.layers[0].self_attn.k_proj
    with attach(model, "pitome", keep=288, metric="hidden") as handle:
        assert not key._forward_hooks
        for _ in range(2):
            with handle.using(metric="keys"):
                logits(model, one)
                assert len(key._forward_hooks) == 1
    assert not key._forward_hooks and not hasattr(key, "_pitome")
