"""What people do with models that merge behind their projector, family by family: generate, train, count, take off."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from checks import assert_same_modules, logits, new_ids
from families import NO_PICTURE, QUESTIONS, TWO_PICTURES, pictures
from models import BEFORE_518, picture
from packed import PACKED
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pitome_mllm import attach, estimate
from pitome_mllm.costs.flops import MLP_MATRICES
from pitome_mllm.hooks.call import Encoded
from pitome_mllm.methods import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # GLM-4V's processor
]
FAMILIES = pytest.mark.parametrize("family", PACKED, ids=lambda family: family.title)
IGNORE = -100
LAST = 3  # columns at the end of every row that have labels
WAYS = {
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
}
NEWER = {"lookup": {"prompt_lookup_num_tokens": 2}, "chunks": {"prefill_chunk_size": 16}}  # see `models.since_518`
STATEFUL = ("lookup", "draft"), ValueError, "not supported with stateful models"
BOTH_WAYS = ("chunks",), UserError, "prefill_chunk_size=16 does not go"
REFUSED = {  # key: class of the model; by transformers itself, or where a picture's tokens see each other both ways
    "Qwen3_5ForConditionalGeneration": STATEFUL,
    "Qwen3_5MoeForConditionalGeneration": STATEFUL,
    "Gemma3ForConditionalGeneration": BOTH_WAYS,
    "Gemma4ForConditionalGeneration": BOTH_WAYS,
    "Ovis2ForConditionalGeneration": (("chunks",), TypeError, "not subscriptable"),
}


@pytest.fixture(scope="module")
def merging():
    """A model of a family that keeps a quarter, its handle, and the inputs of one row and of several."""
    made = {}

    def make(family):
        if family.title not in made:
            model, rows = (
                family.build(),
                [(TWO_PICTURES, pictures(1, 2)), (QUESTIONS[1], pictures(3)), (NO_PICTURE, [])],
            )
            handle = attach(model, "pitome", keep=0.25)
            made[family.title] = model, handle, family.process(rows[:1]), family.process(rows)
        return made[family.title]

    return make


@FAMILIES
def test_ways_to_generate_change_no_answer(family, merging):
    model, _, one, batch = merging(family)
    answer, (refused, error, said) = new_ids(model, one, 3), REFUSED.get(family.model, ((), None, None))
    ways = WAYS if BEFORE_518 else WAYS | NEWER | {"draft": {"assistant_model": family.build(seed=2)}}
    for name, options in ways.items():
        if name in refused:
            with pytest.raises(error, match=said):
                new_ids(model, one, 3, **options)
        else:
            assert new_ids(model, one, 3, **options) == answer, name
    beams = new_ids(model, batch, 3, num_beams=2)
    assert beams == new_ids(model, batch, 3, num_beams=2, cache_implementation="static")
    assert [beams[0]] == new_ids(model, one, 3, num_beams=2)


def test_pictures_of_one_colour_are_repeated_whole():
    """Whose patches are alike, so that they look as if each was there several times, as older releases repeat tiles."""
    (family,) = (family for family in PACKED if family.title == "Qwen3-VL")
    model, white = family.build(), [Image.new("RGB", size, "white") for size in ((60, 20), (30, 44))]
    inputs = family.process([(TWO_PICTURES, white)])
    given = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    with attach(model, keep=0.25) as handle, torch.no_grad():
        made = model.model.get_image_features(**given)
        twice = torch.cat([given["pixel_values"]] * 2)
        assert Encoded(handle.plan, {"image": (given["pixel_values"], made)}).take("image", twice, handle.plan) is None


def labelled(inputs):
    """Labels at the last columns only, which are behind the pictures."""
    labels = torch.full_like(inputs["input_ids"], IGNORE)
    labels[:, -LAST:] = inputs["input_ids"][:, -LAST:]
    return labels


@FAMILIES
def test_adapters_learn_with_and_without_checkpoints(family):
    """The loss is that of the logits, its gradients are the same from checkpoints, and a step makes it less."""
    model = get_peft_model(family.build(), LoraConfig(r=4, target_modules=r".*language_model.*(q|v)_proj"))
    inputs = family.process([(TWO_PICTURES, pictures(1, 2)), (QUESTIONS[1], pictures(3))])
    inputs.pop("labels", None)
    labels, weights = labelled(inputs), [weight for weight in model.parameters() if weight.requires_grad]
    runs = []
    model.get_base_model().model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    with attach(model, "pitome", keep=0.25):
        seen = logits(model, inputs)[:, -LAST - 1 : -1]
        expected = F.cross_entropy(seen.flatten(0, 1), labels[:, -LAST:].flatten())
        found = []
        for checkpoints in (False, True):
            if checkpoints:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train().zero_grad()
            loss = model(**inputs, labels=labels, use_cache=False).loss
            torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5, check_dtype=False)
            runs.clear()
            loss.backward()
            assert len(runs) == checkpoints  # they are run again
            found.append([weight.grad.clone() for weight in weights])
        assert any(grad.abs().max() > 0 for grad in found[0])
        torch.testing.assert_close(*found, atol=1e-8, rtol=1e-6)
        with torch.no_grad():
            for weight in weights:
                weight -= 0.01 * weight.grad
            assert model(**inputs, labels=labels, use_cache=False).loss < expected


@FAMILIES
def test_taken_off_without_a_trace(family):
    model, plain = family.build(), family.build()
    inputs = family.process([(TWO_PICTURES, pictures(1, 2))])
    for one in (model, plain):
        handle = attach(model, "pitome", keep=0.25) if one is model else None
        logits(one, inputs), new_ids(one, inputs, 2)
        if handle:
            handle.remove()
    assert torch.equal(logits(model, inputs), logits(plain, inputs))
    assert_same_modules(model, plain)


def counted(model, inputs):
    """FLOPs of the LLM's blocks in a call, and how many tokens they get."""
    counter, seen = FlopCounterMode(display=False), []
    language = model.model.language_model

    def start(module, args, kwargs):
        seen.append(kwargs["inputs_embeds"].shape[1])
        counter.__enter__()

    hooks = [
        language.register_forward_pre_hook(start, with_kwargs=True),
        language.register_forward_hook(lambda *_: counter.__exit__(None, None, None)),
    ]
    logits(model, inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return counter.get_total_flops(), seen[0]


@FAMILIES
def test_the_llm_saves_what_is_estimated(family):
    """FLOPs counted while a prompt runs, before and after; where the LLM is one whose FLOPs are known, as many."""
    model = family.build()
    model.set_attn_implementation("eager")  # the counter does not see into other kernels
    inputs = family.process([(TWO_PICTURES, pictures(1, 2))])
    plain, length = counted(model, inputs)
    with attach(model, "pitome", keep=0.25):
        merged, shorter = counted(model, inputs)
    ratio = shorter / length
    assert length == inputs["input_ids"].shape[1] and ratio < 0.6
    assert ratio**2 < merged / plain < 1.01 * ratio
    text = model.config.text_config
    if text.model_type in MLP_MATRICES:
        head = 2 * text.hidden_size * text.vocab_size
        for flops, tokens in ((plain, length), (merged, shorter)):
            expected = estimate(model, images=0, text_tokens=tokens).prefill_flops - head
            assert flops == pytest.approx(expected, rel=0 if not BEFORE_518 else 1e-3)  # 5.17 has a product for angles


@pytest.mark.parametrize("family", [family for family in PACKED if family.clip], ids=lambda family: family.title)
def test_frames_of_a_video_merge_each_for_itself(family):
    """Before a picture, where the family takes both in a prompt; and generate() says what forward() says."""
    model, frames = family.build(), [picture(0), picture(1)]
    inputs = family.film(frames, *(pictures(1) if family.mixes else ()))
    plain, answer = logits(model, inputs), new_ids(model, inputs, 2)
    with attach(model, "pitome", keep=1.0) as handle:
        assert torch.equal(logits(model, inputs), plain) and new_ids(model, inputs, 2) == answer
        handle.update(keep=0.25)
        seen = logits(model, inputs)
        assert len(handle.stats.lengths) == len(frames) + family.mixes
        assert list(handle.stats.lengths) == family.kept([len(group) for group in handle.stats.groups], 0)
        gone = sum(map(len, handle.stats.groups)) - sum(handle.stats.lengths)
        assert seen.shape[1] == plain.shape[1] - gone and gone > 0.7 * (inputs["mm_token_type_ids"] > 0).sum()
        assert [row[0] for row in new_ids(model, inputs, 2)] == seen[:, -1].argmax(-1).tolist()


def test_every_llm_of_known_flops_that_comes_in_such_a_family_only_is_counted():
    counted = {family.config().text_config.model_type for family in PACKED}
    assert {*MLP_MATRICES} - {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} <= counted
