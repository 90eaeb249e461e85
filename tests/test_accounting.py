"""Estimates against what torch counts while a model runs; latency without side effects."""

from contextlib import nullcontext
from functools import lru_cache

import pytest
import torch
from models import PATCHES, QUESTION, build, config, picture, processor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig, LlavaConfig, SiglipVisionModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pitome_mllm import attach, load
from pitome_mllm.costs import latency
from pitome_mllm.costs.answer import AnswerCost
from pitome_mllm.costs.flops import MLP_MATRICES, estimate
from pitome_mllm.costs.latency import measure
from pitome_mllm.families.features import tower_features

TEXT = len(QUESTION.split())  # the placeholder left out, <s> added


@lru_cache
def model(**options):
    return build(attention="eager", dtype=torch.float32, **options)  # torch counts eager attention on every device


@lru_cache
def inputs(rows=1, images=1, **options):
    text = " ".join(["<image>"] * (images - 1) + [QUESTION])
    pictures = [picture(i) for i in range(rows * images)]
    return dict(processor(**options)(images=pictures, text=[text] * rows, return_tensors="pt"))


@torch.no_grad()
def counted(model, inputs, **options):
    """FLOPs of one forward pass by part, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        model(**inputs, **options)
    flops = {name: sum(by.values()) for name, by in counter.get_flop_counts().items()}
    part = "LlavaForConditionalGeneration.model"
    return {
        "tower": flops[f"{part}.vision_tower"],
        "projector": flops[f"{part}.multi_modal_projector"],
        "llm": flops[f"{part}.language_model"] + flops["LlavaForConditionalGeneration.lm_head"],
        "all": flops["Global"],
    }


def close(got, expected):
    return got == pytest.approx(expected, rel=0.01)


SETTINGS = [
    {"keep": PATCHES},
    {"keep": 288},
    {"keep": 57},
    {"keep": 20, "schedule": "early"},
    {"keep": 200, "merges": 2, "schedule": "delayed"},
    {"ratio": 0.8},
    {"counts": [500, 400, 400, 300, 200, 100]},
    {"keep": 100, "method": "tome"},
    {"keep": 144, "method": "pitome-bsm"},
    {"keep": 144, "method": "pitome-llava"},
    {"keep": 144, "method": "random"},
    {"keep": 144, "place": "end", "metric": "hidden"},
    {"keep": 100, "where": "projector"},
    {"keep": 144, "method": "pool", "where": "projector"},
    {"keep": 36, "where": "both"},
    {"keep": 36, "where": "both", "tower_keep": 300},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_merged_model_costs_what_torch_counts(settings):
    expected = estimate(model(), text_tokens=TEXT, logits="all", **settings)
    with attach(model(), **settings) as handle:
        flops = counted(model(), inputs())
        assert expected.visual_tokens == handle.plan.keep
    assert close(expected.tower_flops + expected.projector_flops + expected.merging_flops, flops["all"] - flops["llm"])
    assert close(expected.projector_flops, flops["projector"])
    assert close(expected.prefill_flops, flops["llm"])
    assert close(expected.flops, flops["all"])


@pytest.mark.parametrize("keep", [PATCHES, 144])
def test_the_tower_alone_within_a_percent_whatever_the_merging_costs(keep):
    settings = {"keep": keep, "method": "random"}  # looks at nothing
    expected = estimate(model(), text_tokens=TEXT, **settings)
    with attach(model(), **settings):
        assert close(expected.tower_flops, counted(model(), inputs())["tower"])
    assert expected.merging_flops == 0


@pytest.mark.parametrize(
    "options",
    [{"feature_layer": -1}, {"feature_layer": 3}, {"strategy": "full"}, {"tower": "siglip", "strategy": "full"}],
    ids=str,
)
@pytest.mark.parametrize("keep", [1.0, 100])
def test_other_towers_and_feature_layers(options, keep):
    given = inputs(strategy=options.get("strategy", "default"), class_token=options.get("tower") != "siglip")
    expected = estimate(model(**options), keep=keep, text_tokens=TEXT, logits="all")
    with attach(model(**options), keep=keep):
        flops = counted(model(**options), given)
    assert close(expected.flops, flops["all"]) and close(expected.prefill_flops, flops["llm"])


def test_siglip_computes_its_pooling_head():
    settings = config(tower="siglip", strategy="full", layers=2)
    without = estimate(settings)
    settings.vision_config.vision_use_head = True
    settings.vision_config._attn_implementation = "eager"
    tower = SiglipVisionModel(settings.vision_config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower(inputs()["pixel_values"])
    assert close(estimate(settings).tower_flops, counter.get_total_flops())
    assert estimate(settings).tower_flops > without.tower_flops


@torch.no_grad()
@pytest.mark.parametrize("keep", [1.0, 144])
def test_fused_attention_with_and_without_a_size_bias_costs_the_same(keep):
    own = build(layers=4, attention="sdpa")

    def products(query, key, value, *_, **__):  # two matrix products, as torch counts the fused kernels of GPUs
        return 4 * query[0] * query[1] * query[2] * query[3] * key[2]

    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: products}
    with attach(own, keep=keep), FlopCounterMode(display=False, custom_mapping=fused) as counter:
        own(**inputs())
    assert close(estimate(own, keep=keep, text_tokens=TEXT, logits="all").flops, counter.get_total_flops())


@pytest.fixture(scope="module")
def embedded():
    """The embedded model with a question about a picture, and the tokens of its text."""
    own, process = load("tiny")
    own.set_attn_implementation("eager")
    text = "USER: <image>\nwhat colour is the star ? ASSISTANT:"
    prompt = dict(process(images=picture(0), text=text, return_tensors="pt"))
    return own, prompt, prompt["input_ids"].shape[1] - PATCHES


@pytest.mark.parametrize("keep", [PATCHES, 288, 144, 36])
def test_the_embedded_model_costs_what_torch_counts(keep, embedded):
    own, prompt, text = embedded
    expected = estimate(own.config, "pitome", keep=keep, text_tokens=text, logits="all")
    with attach(own, "pitome", keep=keep):
        flops = counted(own, prompt)
    assert close(expected.tower_flops + expected.merging_flops, flops["all"] - flops["llm"] - flops["projector"])
    assert close(expected.prefill_flops, flops["llm"]) and close(expected.projector_flops, flops["projector"])


def test_a_tower_alone_costs_what_it_costs_in_a_model_that_reads_its_last_block():
    whole = config(feature_layer=-1)
    for settings in ({}, {"keep": 100, "where": "tower"}, {"ratio": 0.9, "method": "tome"}):
        alone, within = estimate(whole.vision_config, images=3, **settings), estimate(whole, images=3, **settings)
        assert (alone.tower_flops, alone.merging_flops) == (within.tower_flops, within.merging_flops)
        assert alone.flops == alone.tower_flops + alone.merging_flops and alone.kv_bytes == 0
        assert alone.visual_tokens == within.visual_tokens
    with pytest.raises(ValueError, match="an encoder alone has no projector; choose where='tower'"):
        estimate(whole.vision_config, keep=100, where="both")
    with pytest.raises(ValueError, match="unsupported family 'llama'; supported: llava, .* a new one is a row"):
        estimate(whole.text_config)


def test_several_pictures_and_rows():
    expected = estimate(model(), keep=144, batch=2, images=2, text_tokens=TEXT, logits="all")
    with attach(model(), keep=144):
        flops = counted(model(), inputs(2, 2))
    assert expected.prompt_tokens == 2 * 144 + TEXT
    assert close(expected.flops, flops["all"]) and close(expected.prefill_flops, flops["llm"])


def test_logits_of_the_last_position_as_in_generate():
    expected = estimate(model(), text_tokens=TEXT, logits="last")
    assert close(expected.prefill_flops, counted(model(), inputs(), logits_to_keep=1)["llm"])
    assert expected.prefill_flops < estimate(model(), text_tokens=TEXT, logits="all").prefill_flops


@torch.no_grad()
def test_new_tokens_cost_what_torch_counts():
    with FlopCounterMode(display=False) as one:
        model().generate(**inputs(), max_new_tokens=1, min_new_tokens=1, do_sample=False)
    with FlopCounterMode(display=False) as nine:
        model().generate(**inputs(), max_new_tokens=9, min_new_tokens=9, do_sample=False)
    expected = estimate(model(), text_tokens=TEXT, new_tokens=9)
    assert close(expected.decode_flops, nine.get_total_flops() - one.get_total_flops())
    assert close(expected.flops, nine.get_total_flops())
    assert estimate(model(), new_tokens=1).decode_flops == estimate(model()).decode_flops == 0


def small_llm(kind, kv_heads):
    settings = AutoConfig.for_model(kind)
    own = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    own |= {"num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for name, value in own.items():
        setattr(settings, name, value)
    if getattr(settings, "head_dim", None) is not None:
        settings.head_dim = 32
    if hasattr(settings, "num_key_value_heads"):
        settings.num_key_value_heads = kv_heads
    if getattr(settings, "layer_types", None):
        settings.layer_types = settings.layer_types[:2]
    return settings


ALONE = sorted({*MLP_MATRICES} & {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES})  # the others: in test_packed_use


@pytest.mark.parametrize("kind,kv_heads", [*((kind, 2) for kind in ALONE), ("llama", 1), ("llama", 4)])
@torch.no_grad()
def test_every_known_llm_costs_and_stores_what_torch_counts(kind, kv_heads):
    settings = small_llm(kind, kv_heads)
    llm = AutoModelForCausalLM.from_config(settings, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter:
        cache = llm(input_ids=torch.ones(2, 200, dtype=torch.long), use_cache=True).past_key_values
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    whole = config()
    whole.text_config = settings
    expected = estimate(whole, images=0, batch=2, text_tokens=200, logits="all", dtype=torch.float32)
    assert close(expected.flops, counter.get_total_flops())
    assert expected.kv_bytes == stored


@torch.no_grad()
def test_the_cache_holds_every_token_but_the_last():
    with attach(model(), keep=144):
        out = model().generate(**inputs(), max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True)
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
    assert estimate(model(), keep=144, text_tokens=TEXT, new_tokens=4).kv_bytes == stored


def test_dtypes_of_the_cache():
    floats = estimate(config(), dtype=torch.float32).kv_bytes
    assert estimate(config()).kv_bytes == floats // 2
    assert estimate(config(), dtype="bfloat16").kv_bytes == floats // 2
    assert estimate(model()).kv_bytes == floats  # the model's own
    with pytest.raises(ValueError, match="unknown dtype 'half-ish'"):
        estimate(config(), dtype="half-ish")


def llava_7b():
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    return LlavaConfig(vision_config=vision, text_config=LlamaConfig(vocab_size=32064))


@pytest.mark.parametrize(
    ("ratio", "tokens", "tower"), [(0.9, 54, 0.351), (0.95, 183, 0.562), (0.975, 330, 0.741), (1.0, 576, 1.0)]
)
def test_llava_1_5_7b_from_its_configuration(ratio, tokens, tower):
    plain, merged = estimate(llava_7b()), estimate(llava_7b(), "pitome", ratio=ratio, published=True)
    assert merged.visual_tokens == tokens and merged.prompt_tokens == tokens + 40
    assert merged.tower_flops / plain.tower_flops == pytest.approx(tower, abs=0.004)
    assert plain.tower_flops == pytest.approx(382e9, rel=0.01)
    assert merged.merging_flops < 0.004 * plain.tower_flops
    assert plain.kv_bytes == 616 * 2 * 32 * 4096 * 2


@pytest.mark.parametrize("keep", [None, PATCHES, 1.0])
def test_keeping_everything_costs_what_the_plain_model_costs(keep):
    assert estimate(config(), keep=keep) == estimate(config())
    assert estimate(config()).merging_flops == 0


def test_without_pictures_only_the_text_costs():
    cost = estimate(config(), images=0, text_tokens=10)
    assert cost.tower_flops == cost.merging_flops == cost.projector_flops == 0 and cost.prompt_tokens == 10


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch": 0}, "batch=0 is not possible; give 1 or more"),
        ({"images": -1}, "images=-1"),
        ({"text_tokens": -1}, "text_tokens=-1"),
        ({"new_tokens": -1}, "new_tokens=-1"),
        ({"logits": "first"}, "unknown logits 'first'; choose from last, all"),
        ({"keep": 577}, "577"),
        ({"keep": 100, "ratio": 0.9}, "keep=100 and ratio=0.9"),
        ({"method": "pitom"}, "did you mean 'pitome'"),
        ({"where": "nowhere"}, "nowhere"),
    ],
)
def test_errors_say_what_is_possible(settings, words):
    with pytest.raises(ValueError, match=words):
        estimate(config(), **settings)


def test_an_unknown_llm_is_refused_by_name():
    settings = config()
    settings.text_config.model_type = "unheard_of"
    with pytest.raises(ValueError, match="unknown LLM 'unheard_of'; FLOPs are known for .*llama"):
        estimate(settings)


def state(module):
    """What a call could leave behind: attributes and hooks of every module, weights, mode."""
    return (
        [(name, sorted(vars(part)), part.training, len(part._forward_hooks)) for name, part in module.named_modules()],
        {name: value.clone() for name, value in module.state_dict().items()},
    )


@pytest.mark.parametrize("how", ["plain", "attached", "using", "without"])
def test_measure_times_a_model_as_it_is_and_leaves_it_so(how):
    own = build(layers=4)
    prompt = inputs(rows=2)
    own.generate(**prompt, max_new_tokens=2)  # transformers installs recorders on a first run
    before = state(own)
    seen = []
    hook = own.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    if how == "plain":
        cost = measure(own, prompt, new_tokens=3)
    else:
        with attach(own, keep=100 if how != "using" else 300) as handle:
            chosen = {"without": lambda: handle.using(None), "using": lambda: handle.using(keep=100)}
            with chosen.get(how, nullcontext)():
                cost = measure(own, prompt, new_tokens=3)
    hook.remove()
    assert seen == [TEXT + (100 if how in ("attached", "using") else PATCHES), 1, 1]
    assert min(cost.tower_ms, cost.prefill_ms, cost.per_token_ms) > 0
    after = state(own)
    assert after[0] == before[0]
    assert all(torch.equal(after[1][name], value) for name, value in before[1].items())


def test_measure_tells_tower_first_token_and_further_tokens_apart(monkeypatch):
    """On a clock that the tower moves by 1 s and every new token by 16, also where the model would stop."""
    own, passed = build(layers=2), []
    own.generation_config.eos_token_id = own.generate(**inputs(), max_new_tokens=1)[0, -1].item()
    own.model.vision_tower.register_forward_hook(lambda *_: passed.append(1))
    own.lm_head.register_forward_hook(lambda *_: passed.append(16))
    monkeypatch.setattr(latency, "now", lambda *_: sum(passed))
    taken = measure(own, inputs(), new_tokens=4)
    assert (taken.tower_ms, taken.prefill_ms, taken.per_token_ms) == (1000, 17000, 16000)
    assert passed == [1, 16, 16, 16, 16]


def test_a_clock_knows_nothing_of_what_did_not_happen():
    own = build(layers=2)
    with latency.timed(own) as clock:
        pass
    assert clock.cost() == AnswerCost()
    with latency.timed(own) as clock:
        tower_features(own, inputs()["pixel_values"])
    assert clock.cost().tower_ms > 0 and clock.cost().prefill_ms is None
    assert not own._forward_hooks


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"new_tokens": 1}, "new_tokens=1 is not possible; give 2 or more"),
        ({"inputs": {"input_ids": torch.ones(1, 3, dtype=torch.long)}}, "no pixel_values"),
    ],
)
def test_measure_errors(change, words):
    with pytest.raises(ValueError, match=words):
        measure(**{"model": model(), "inputs": inputs(), **change})


def test_inference_mode_changes_no_estimate(model):
    expected = estimate(model, "tome", keep=72)
    with torch.inference_mode():
        assert estimate(model, "tome", keep=72) == expected
    assert expected.merging_flops > 0
