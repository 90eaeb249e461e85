"""Merging in models of the original llava package, on a stand-in that keeps to its contract.

The package itself needs a torch and a transformers of its own: `make test-llava` runs the real one, and checks there
that its methods have the very signatures that are listed in `SIGNATURES` and that the stand-in has here.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPVisionConfig

from pitome_mllm import attach
from pitome_mllm.hooks.llava_package import IMAGE, PREPARE, pack

SIGNATURES = Path(__file__).parent / "data" / "llava_signatures.json"  # what is relied on, self left out
SIDE, PATCH, WIDTH, BLOCKS = 16, 4, 8, 3
PATCHES = (SIDE // PATCH) ** 2


class CLIPAttention(nn.Module):
    """One head, and weights beside the output, as in transformers 4.36."""

    num_heads = 1

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states, attention_mask=None, causal_attention_mask=None, output_attentions=False):
        weights = self.q_proj(hidden_states) @ self.k_proj(hidden_states).mT
        weights = weights if attention_mask is None else weights + attention_mask[:, 0]
        return weights.softmax(-1) @ hidden_states, None


class CLIPEncoderLayer(nn.Module):
    """Returns a tuple and takes no keywords but its own."""

    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = CLIPAttention(), nn.Linear(WIDTH, WIDTH)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, hidden_states, attention_mask, causal_attention_mask, output_attentions=False):
        x = hidden_states + self.self_attn(self.layer_norm1(hidden_states), attention_mask)[0]
        return (x + self.mlp(self.layer_norm2(x)),)


class Clip(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = CLIPVisionConfig(
            num_hidden_layers=BLOCKS, num_attention_heads=1, image_size=SIDE, patch_size=PATCH, hidden_size=WIDTH
        )
        self.config._attn_implementation = "eager"
        self.embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.layers = nn.ModuleList(CLIPEncoderLayer() for _ in range(BLOCKS))

    def forward(self, pixels, output_hidden_states=True):
        x = self.embed(pixels).flatten(2).mT
        states = [torch.cat([x.mean(1, keepdim=True), x], 1)]
        for layer in self.layers:
            states.append(layer(states[-1], None, None, output_attentions=False)[0])
        return SimpleNamespace(last_hidden_state=states[-1], hidden_states=tuple(states))


class CLIPVisionTower(nn.Module):
    is_loaded, select_layer, select_feature = True, -2, "patch"

    def __init__(self):
        super().__init__()
        self.vision_tower = Clip()
        self.config = self.vision_tower.config

    def load_model(self, device_map=None):
        raise AssertionError("it is loaded")

    def forward(self, images):
        return self.vision_tower(images, output_hidden_states=True).hidden_states[self.select_layer][:, 1:]


class LlavaMetaForCausalLM:
    def get_vision_tower(self):
        return self.model.vision_tower

    def get_model(self):
        return self.model

    def encode_images(self, images):
        return self.model.mm_projector(self.get_vision_tower()(images))

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=None
    ):
        """Every tile is followed by a newline; one of each picture's tokens, at the end, counts as padding."""
        if images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        features = self.encode_images(torch.cat(list(images))).split([len(image) for image in images])
        if self.config.mm_patch_merge_type == "flat":
            features = [x.flatten(0, 1) for x in features]
        else:
            newline = self.model.image_newline[None]
            features = [torch.cat([part for tile in x for part in (tile, newline)])[:-2] for x in features]
        rows, pictures = [], iter(features)
        for ids, real in zip(input_ids, attention_mask.bool()):
            parts = [
                next(pictures) if token == IMAGE else self.get_model().embed_tokens(token[None]) for token in ids[real]
            ]
            rows.append(torch.cat(parts)[: self.config.tokenizer_model_max_length])
        mask = pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True)
        return None, position_ids, mask, past_key_values, pad_sequence(rows, batch_first=True), labels


class LlavaLlamaForCausalLM(LlavaMetaForCausalLM, nn.Module):
    def __init__(self, layout: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(model_type="llava_llama", mm_patch_merge_type=layout)
        self.config.tokenizer_model_max_length = None
        self.device = torch.device("cpu")
        self.model = nn.Module()
        self.model.vision_tower, self.model.mm_projector = CLIPVisionTower(), nn.Linear(WIDTH, WIDTH)
        self.model.embed_tokens = nn.Embedding(10, WIDTH)
        self.model.image_newline = nn.Parameter(torch.randn(WIDTH))


def prompt(*rows, tiles=(3, 2)):
    """Arguments of the method that writes pictures of so many tiles into prompts."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(n, 3, SIDE, SIDE, generator=generator) for n in tiles]
    return torch.tensor(rows), None, torch.ones(len(rows), len(rows[0])), None, None, images, None


def test_the_stand_in_keeps_to_the_contract():
    classes = {c.__name__: c for c in (CLIPAttention, CLIPEncoderLayer, CLIPVisionTower, LlavaMetaForCausalLM)}
    for name, parameters in json.loads(SIGNATURES.read_text()).items():
        owner, method = name.split(".")
        assert list(inspect.signature(getattr(classes[owner], method)).parameters)[1:] == parameters, name


def test_mpt_models_are_refused():
    """The package's own forward() fails on pictures there; `make test-llava` shows it."""
    model = type("LlavaMptForCausalLM", (LlavaLlamaForCausalLM,), {})("flat")
    with pytest.raises(ValueError, match="LlavaMptForCausalLM: its own forward.* supported there: LlavaLlama"):
        attach(model, keep=4)
    assert "_pitome" not in vars(model)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*MatMul8bitLt.*")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("layout, where", [("flat", "both"), ("spatial_unpad", "tower"), ("spatial_unpad", "packed")])
def test_quantised_projections_merge(layout, where, bits):
    """As load_pretrained_model quantises: every linear layer; the package's own bitsandbytes needs a GPU."""
    model = quantised(LlavaLlamaForCausalLM(layout), bits)
    plain = quantised(LlavaLlamaForCausalLM(layout), bits)
    given = prompt([1, IMAGE, 2], [IMAGE, 3, 4])
    full = getattr(plain, PREPARE)(*given)[4]
    with attach(model, "pitome", published=True, keep=1.0, where=where) as handle:
        assert torch.equal(getattr(model, PREPARE)(*given)[4], full)
        handle.update(keep=4)
        seen = getattr(model, PREPARE)(*given)[4]
        assert seen.isfinite().all() and seen.shape[1] < full.shape[1] and handle.stats.tokens_after == 4
    assert torch.equal(getattr(model, PREPARE)(*given)[4], full)


def quantised(model, bits):
    """``model`` with the linear layers of tower and projector in 4 or 8 bit."""
    import bitsandbytes as bnb

    def made(old):
        if bits == 8:
            new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(old.in_features, old.out_features, compute_dtype=torch.float32, quant_type="nf4")
        new.load_state_dict(old.state_dict())
        return new.to("cpu")

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, made(child))
    return model


@torch.no_grad()
def test_tiles_are_packed_by_the_model_itself():
    model = LlavaLlamaForCausalLM("spatial_unpad")
    *_, images, sizes = prompt([IMAGE])
    first, second = pack(model, images, sizes, model.encode_images)
    whole = getattr(model, PREPARE)(*prompt([IMAGE, IMAGE]))[4][0]
    assert torch.equal(torch.cat([first, second]), whole)
    assert (len(first), len(second)) == (3 * (PATCHES + 1) - 2, 2 * (PATCHES + 1) - 2)


@torch.no_grad()
@pytest.mark.parametrize("layout, where", [("flat", "tower"), ("spatial_unpad", "tower"), ("spatial_unpad", "packed")])
def test_pictures_shrink_in_the_prompt(layout, where):
    model, plain = LlavaLlamaForCausalLM(layout), LlavaLlamaForCausalLM(layout)
    given = prompt([1, IMAGE, 2], [IMAGE, 3, 4])
    full = getattr(plain, PREPARE)(*given)
    with attach(model, "pitome", published=True, keep=1.0, where=where):
        assert torch.equal(getattr(model, PREPARE)(*given)[4], full[4])
    with attach(model, "pitome", published=True, keep=4, where=where) as handle:
        _, _, mask, _, embeds, _ = getattr(model, PREPARE)(*given)
        lengths = mask.sum(1) - 2
        if layout == "flat":
            assert lengths.tolist() == [12, 8]
        elif where == "tower":  # newlines stay, the last of which was cut off; the padded patch may go
            assert lengths[0] in (12 + 2, 12 + 1) and lengths[1] in (8 + 1, 8)
        else:
            assert lengths.tolist() == [4, 4]
        if layout != "flat":
            assert lengths.tolist() == list(handle.stats.lengths)
        assert torch.equal(embeds[0, 0], plain.model.embed_tokens.weight[1])
    assert torch.equal(getattr(model, PREPARE)(*given)[4], full[4])
    assert PREPARE not in vars(model) and "_pitome" not in vars(model)


@torch.no_grad()
def test_a_prompt_is_cut_where_the_package_cuts_it():
    """Pictures merge whole before the prompt is cut."""
    model = LlavaLlamaForCausalLM("spatial_unpad")
    attach(model, "pitome", published=True, keep=12, where="packed")
    whole = getattr(model, PREPARE)(*prompt([1, IMAGE, 2], tiles=(3,)))[4]
    model.config.tokenizer_model_max_length = 7
    assert torch.equal(getattr(model, PREPARE)(*prompt([1, IMAGE, 2], tiles=(3,)))[4], whole[:, :7])
