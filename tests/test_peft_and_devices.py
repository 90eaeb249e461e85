"""Adapters on the tower, and weights on two devices."""

from __future__ import annotations

import pytest
import torch
from checks import logits
from families import BY_TITLE, IMAGE, QUESTIONS, pictures
from peft import LoraConfig, get_peft_model

from pitome_mllm import attach
from pitome_mllm.attach import Attachment

LLAVA, NEXT = BY_TITLE["LLaVA-1.5"], BY_TITLE["LLaVA-NeXT (1.6)"]
KEYS = r".*vision_tower.*\.k_proj"


def with_lora(model):
    """LoRA on the tower's key projections, not at zero, so that the keys by which tokens merge are others."""
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=KEYS, init_lora_weights=False))
    generator = torch.Generator().manual_seed(3)
    for name, weight in wrapped.named_parameters():
        if "lora_" in name:
            weight.data.normal_(0, 0.2, generator=generator)
    return wrapped.eval()


@pytest.mark.parametrize("family", [LLAVA, NEXT], ids=lambda family: family.title)
def test_a_tower_with_lora_merges_by_its_own_keys(family):
    """The same as a model into whose weights the adapter was folded."""
    inputs = family.process([(QUESTIONS[0], pictures(0))])
    wrapped, folded = with_lora(family.build()), with_lora(family.build()).merge_and_unload()
    plain = logits(wrapped, inputs)
    with (
        attach(wrapped, "pitome", published=True, keep=36) as handle,
        attach(folded, "pitome", published=True, keep=36) as other,
    ):
        seen = logits(wrapped, inputs)
        torch.testing.assert_close(seen, logits(folded, inputs), atol=1e-4, rtol=1e-4)
        assert torch.equal(handle.stats.groups, other.stats.groups)
        answer = wrapped.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert torch.equal(answer, folded.generate(**inputs, max_new_tokens=3, do_sample=False))
    assert torch.equal(logits(wrapped, inputs), plain)
    without = family.build()
    attach(without, "pitome", published=True, keep=36)
    logits(without, inputs)
    assert not torch.equal(Attachment.of(without).stats.groups, handle.stats.groups), "the adapter changes nothing"


@pytest.mark.parametrize("wrap_first", [True, False])
def test_adapters_put_on_or_taken_off_later_are_noticed(wrap_first):
    """Tokens would merge by keys without the adapter; removing leaves nothing on either."""
    inputs = LLAVA.process([(QUESTIONS[0], pictures(0))])
    model = LLAVA.build()
    wrapped = with_lora(model) if wrap_first else None
    handle = attach(model, "pitome", published=True, keep=36)
    logits(model, inputs)
    wrapped = wrapped.merge_and_unload() if wrap_first else with_lora(model)
    for call in (lambda: logits(wrapped, inputs), lambda: wrapped.generate(**inputs, max_new_tokens=1)):
        with pytest.raises(RuntimeError, match="another key or query projection.*attach again"):
            call()
    handle.remove()
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not [hook for hook in hooks if "pitome" in getattr(hook, "__module__", "")]
    with attach(wrapped, "pitome", published=True, keep=36) as again:
        logits(wrapped, inputs)
        assert again.stats.tokens_after == 36


def test_adapters_learn_while_tokens_merge():
    """A few steps on one picture: the loss falls, and only the adapter changes."""
    model = LLAVA.build()
    inputs = LLAVA.process([(QUESTIONS[0], pictures(0))])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=r".*(vision_tower|language_model).*\.[kv]_proj"))
    attach(wrapped, "pitome", published=True, keep=9)
    before = {name: weight.clone() for name, weight in wrapped.named_parameters() if not weight.requires_grad}
    optimiser = torch.optim.AdamW([w for w in wrapped.parameters() if w.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = wrapped(**inputs, labels=labels).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(weight, dict(wrapped.named_parameters())[name]) for name, weight in before.items())


@pytest.mark.parametrize("family", [LLAVA, NEXT], ids=lambda family: family.title)
def test_weights_on_two_devices(family, tmp_path):
    """The LLM on disk, the rest in memory, by the device map of transformers and accelerate."""
    family.build().save_pretrained(tmp_path / "model")
    parts = {"vision_tower": "cpu", "multi_modal_projector": "cpu", "language_model": "disk"}
    parts |= {"image_newline": "cpu"} if family is NEXT else {}
    places = {"lm_head": "cpu", **{f"model.{name}": device for name, device in parts.items()}}
    model = family.cls.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "offload"), dtype=torch.float64
    ).eval()
    assert {str(p.device) for p in model.model.language_model.parameters()} == {"meta"}
    whole = family.build()
    inputs = family.process([(QUESTIONS[0], pictures(0))])
    with (
        attach(model, "pitome", published=True, keep=36) as handle,
        attach(whole, "pitome", published=True, keep=36) as other,
    ):
        torch.testing.assert_close(logits(model, inputs), logits(whole, inputs), atol=1e-5, rtol=1e-5)
        assert handle.stats.lengths == other.stats.lengths
        answers = [m.generate(**inputs, max_new_tokens=3, do_sample=False) for m in (model, whole)]
        assert torch.equal(*answers)
