"""Families without a row: they work by probing, with a notice, or are refused with what was looked for."""

from __future__ import annotations

import pytest
import torch
import transformers
from by_hand import states
from checks import assert_same_modules, logits
from families import BY_TITLE, IMAGE, PATCHES, QUESTIONS, WIDTH, clip, config, llm, pictures, siglip
from models import scale_weights

from pitome_mllm import attach, get_method
from pitome_mllm.families import geometry
from pitome_mllm.families.probe import probe

DEEPSEEK = BY_TITLE["DeepSeek-VL (found by probing)"]


@torch.no_grad()
def test_what_is_found_merges_as_defined(caplog):
    model, plain = DEEPSEEK.build(), DEEPSEEK.build()
    inputs = DEEPSEEK.process([(QUESTIONS[0], pictures(0))])
    with caplog.at_level("WARNING"):
        handle = attach(model, "pitome", keep=36)
    for word in ("DeepseekVL", "probing", "model.vision_model", "model.aligner", "model.language_model"):
        assert word in caplog.text
    seen = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    tower = plain.model.vision_model
    x = states(tower, inputs["pixel_values"], handle.plan.counts, get_method("pitome"), 0)[6]
    torch.testing.assert_close(seen, plain.model.aligner(tower.post_layernorm(x)), atol=1e-5, rtol=1e-5)


def test_probing_leaves_nothing_behind():
    model, twin = DEEPSEEK.build(), DEEPSEEK.build()
    inputs = DEEPSEEK.process([(QUESTIONS[0], pictures(0))])
    for plain in (model, twin):
        plain.model.get_image_features(inputs["pixel_values"], output_hidden_states=True)
    attach(model, keep=36).remove()
    assert torch.equal(logits(model, inputs), logits(twin, inputs))
    assert_same_modules(model, twin)


class Direct(transformers.LlavaModel, transformers.GenerationMixin):
    """A model that encodes pictures itself, without a part for it at .model."""

    def __init__(self, settings):
        super().__init__(settings)
        self.lm_head = torch.nn.Linear(WIDTH, settings.text_config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, pixel_values=None, attention_mask=None, **options):
        given = dict(attention_mask=attention_mask, **options)
        output = super().forward(input_ids, pixel_values, **given)
        return transformers.modeling_outputs.CausalLMOutputWithPast(
            logits=self.lm_head(output.last_hidden_state), past_key_values=output.past_key_values
        )


def test_parts_may_lie_on_the_model_itself():
    """The same weights give the same as in a LLaVA."""
    known, inputs = BY_TITLE["LLaVA-1.5"].build(), BY_TITLE["LLaVA-1.5"].process([(QUESTIONS[0], pictures(0))])
    model = Direct(known.config).double().eval()
    model.load_state_dict({name.removeprefix("model."): weight for name, weight in known.state_dict().items()})
    for where in ("tower", "both"):
        with attach(model, "pitome", keep=36, where=where) as handle, attach(known, "pitome", keep=36, where=where):
            torch.testing.assert_close(logits(model, inputs), logits(known, inputs), atol=1e-5, rtol=1e-5)
            assert (handle.family.core, handle.family.tower) == ("", "vision_tower")


class Renamed(transformers.LlavaForConditionalGeneration):
    """A LLaVA that is none by name."""


def small_llava(layer: int, strategy: str):
    made = config("LlavaConfig", clip, llm("LlamaConfig"), vision_feature_layer=layer)()
    made.vision_feature_select_strategy = strategy
    model = transformers.LlavaForConditionalGeneration(made)
    scale_weights(model, 1)
    return model.eval()


@pytest.mark.parametrize("layer,strategy", [(-2, "default"), (3, "full")])
def test_probing_finds_what_the_row_says(layer, strategy):
    """On LLaVA-1.5, as if it had no row."""
    model = small_llava(layer, strategy)
    family, found = probe(model)
    known = geometry(model.config)
    for name in ("grid", "class_tokens", "visible_class_tokens", "merging_blocks", "blocks", "layers", "available"):
        assert getattr(found, name) == getattr(known, name), name
    assert (family.tower, family.projector) == ("model.vision_tower", "model.multi_modal_projector")
    assert (family.language, family.core, family.last) == ("model.language_model", "model", False)


def test_a_subclass_of_a_known_family_needs_no_probing(caplog):
    model = Renamed(config("LlavaConfig", clip, llm("LlamaConfig"), vision_feature_layer=-2)()).eval()
    with caplog.at_level("WARNING"):
        attach(model, "pitome", keep=36)
    assert "probing" not in caplog.text


def aya():
    options = dict(downsample_factor=2, adapter_layer_norm_eps=1e-6, alignment_intermediate_size=2 * WIDTH)
    return transformers.AyaVisionForConditionalGeneration(
        config("AyaVisionConfig", siglip, llm("LlamaConfig"), vision_feature_layer=-1, **options)()
    )


def gemma3():
    made = transformers.Gemma3Config(
        vision_config=siglip().to_dict(),
        text_config=llm("Gemma3TextConfig", head_dim=WIDTH // 2)().to_dict(),
        image_token_index=IMAGE,
        mm_tokens_per_image=PATCHES // 4,
    )
    return transformers.Gemma3ForConditionalGeneration(made)


def blip():
    return transformers.BlipForConditionalGeneration(
        transformers.BlipConfig(
            vision_config=dict(
                hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=16
            ),
            text_config=dict(
                hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9
            ),
        )
    )


def unnamed():
    model = DEEPSEEK.build()
    vars(model.config)["image_token_id"] = None  # the class takes only numbers
    return model


def hybrid():
    high = dict(
        hidden_size=16, output_channels=8, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=16,
        mlp_dim=16, global_attn_indexes=[0], window_size=2, num_pos_feats=8,
    )  # fmt: skip
    made = dict(vision_config=siglip().to_dict(), text_config=llm("LlamaConfig")().to_dict(), image_token_id=IMAGE)
    made = transformers.DeepseekVLHybridConfig(**made, high_res_vision_config=high)
    return transformers.DeepseekVLHybridForConditionalGeneration(made)


REFUSED = [
    (lambda: DEEPSEEK.build().model, ["DeepseekVLModel", "a generate()", "the whole model"]),
    (unnamed, ["image_token_id", "there is none"]),
    (hybrid, ["get_image_features() of pixels alone", "needs high_res_pixel_values"]),
    (aya, ["AyaVision", "every token by itself", "joins patches"]),
    (gemma3, ["Gemma3", "every token by itself", "joins patches"]),
    (blip, ["Blip", "clip_vision_model", "siglip_vision_model", "there is none"]),
]


@pytest.mark.parametrize("make,words", REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_what_cannot_merge_is_refused_with_what_was_looked_for(make, words):
    model = make().eval()
    with pytest.raises(ValueError) as error:
        attach(model, keep=4)
    for word in [*words, "looked for", "LlavaForConditionalGeneration"]:
        assert word in str(error.value), error.value
    for module in model.modules():
        assert "_pitome" not in vars(module) and not module._forward_pre_hooks
