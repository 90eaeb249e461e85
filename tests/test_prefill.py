"""``graph=`` for the LLM's prefill: the tokens, logits and KV caches of eager calls, and what no graph can hold.

`Recorded` stands in for a CUDA graph, as in `test_graphs`.
"""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from models import BEFORE_524, CACHE, build
from peft import LoraConfig, get_peft_model
from test_graphs import Recorded, recorded  # noqa: F401
from transformers import DynamicCache

from pitome_mllm import attach
from pitome_mllm.hooks import graphs


def prefills() -> list[Recorded]:
    return [each for each in Recorded.made_so_far if each.call.__self__.name == "the LLM's prefill"]


def replays() -> int:
    return sum(each.replays for each in prefills())


def answer(model, inputs, **options):
    options = {"do_sample": False, "max_new_tokens": 3, **options}
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)


def tensors(answer):
    cache = answer[CACHE if CACHE in answer else "past_key_values"]
    return [answer.sequences, *answer.logits, *(x for layer in cache.layers for x in (layer.keys, layer.values))]


def assert_same(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(expected), strict=True))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}], ids=str)
def test_replays_generate_what_eager_calls_do(one, pair, options):
    model, other = build(layers=2), {name: value[1:] for name, value in pair.items()}

    def run(inputs):
        torch.manual_seed(0)
        return answer(model, inputs, **options)

    with attach(model, keep=144, graph=True) as handle:
        run(one)
        assert (len(prefills()), len(handle.prefills)) == (1, 1)
        first, second = run(one), run(other)
        kept = [x.clone() for x in tensors(first)]
        run(other)
        assert replays() == 3 and all(torch.equal(a, b) for a, b in zip(tensors(first), kept, strict=True))
        with handle.using(graph=False):
            assert_same(first, run(one))
            assert_same(second, run(other))
    assert len(handle.prefills) == 0 and all(each.made is None for each in prefills())
    assert "forward" not in vars(model.model.language_model)


def test_padding_and_later_turns_go_through_a_graph(process, one):
    from models import QUESTION, picture

    model = build(layers=2)
    padded = process(
        images=[picture(0), picture(1)], text=[QUESTION, QUESTION + " a red star"], return_tensors="pt", padding=True
    )
    with attach(model, keep=144, graph=True) as handle:
        with handle.using(graph=False):
            expected, alone = answer(model, padded), answer(model, one)
        for _ in range(3):
            assert_same(answer(model, padded), expected)
        assert (len(prefills()), replays()) == (1, 2)

        def next_turn(past):
            ids = torch.cat([past.sequences, one["input_ids"][:, -3:]], 1)
            return answer(model, {"input_ids": ids, CACHE: past[CACHE], "attention_mask": torch.ones_like(ids)})

        with handle.using(graph=False):
            continued = next_turn(alone)
        for _ in range(3):
            assert_same(next_turn(answer(model, one)), continued)
        assert (len(prefills()), replays()) == (2, 4)


def test_the_default_captures_the_tower_alone(one):
    model = build(layers=2)
    with attach(model, keep=144) as handle:
        for _ in range(3):
            answer(model, one)
        assert (len(handle.graphs), len(handle.prefills)) == (1, 0) and not prefills()
        with handle.using(graph=True):
            for expected in ((1, 0), (1, 1)):
                answer(model, one)
                assert (len(prefills()), replays()) == expected
        answer(model, one)
        assert (len(prefills()), replays(), len(handle.prefills)) == (1, 1, 1)
        handle.update(graph="auto")
        assert len(handle.graphs) > 0 and len(handle.prefills) == 0


def test_few_prefills_are_kept(one):
    model = build(layers=2)
    with attach(model, graph=True, keep=144) as handle:
        for keep in range(144, 145 + graphs.KEPT):
            with handle.using(keep=keep):
                answer(model, one, max_new_tokens=1)
        assert len(handle.prefills) == graphs.KEPT and prefills()[0].made is None


def adapted(model):
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    return wrapped.eval().requires_grad_(False) and None


CASES = {
    "states": (lambda model: {"output_hidden_states": True}, "hidden states were asked for"),
    "attention": (lambda model: {"output_attentions": True}, "attention weights were asked for"),
    "a cache of the caller": (lambda model: {CACHE: DynamicCache()}, "its KV cache is none"),
    "a static cache": (lambda model: {"cache_implementation": "static", "disable_compile": True}, "its KV cache"),
    "adapters": (adapted, "is neither torch's nor transformers'"),
    "a hook inside": (
        lambda model: model.model.language_model.layers[0].mlp.register_forward_hook(lambda *_: None) and None,
        "a forward hook on 'layers.0.mlp'",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_no_graph_can_hold_runs_eagerly_and_is_said_once(case, one, caplog):
    model, (change, reason) = build(layers=2), CASES[case]
    model.set_attn_implementation("eager")  # which gives weights, too
    with attach(model, keep=144, graph=True):
        for _ in range(2):
            answer(model, one, **(change(model) or {}))
    assert not prefills()
    said = [record for record in caplog.records if reason in record.getMessage()]
    assert len(said) == 1 and said[0].levelno == logging.WARNING


def test_without_a_calibration_masks_must_be_the_same_within_a_graph(one):
    """Before transformers 5.24 they are not; from it on a prompt without padding has none."""
    model, masks = build(layers=2), []
    with attach(model, keep=144, calibration="none", graph=True) as handle:
        model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
        with handle.using(graph=False):
            expected = answer(model, one)
        for _ in range(3):
            assert_same(answer(model, one), expected)
    assert replays() == (0 if BEFORE_524 else 2) and masks[0] is None


def test_two_models_and_a_copy_have_graphs_of_their_own(one):
    models = [build(layers=2), build(layers=2, seed=1)]
    attachments = [attach(model, keep=144, graph=True) for model in models]
    models.append(copy.deepcopy(models[0]))
    with torch.no_grad():
        models[2].model.language_model.layers[0].mlp.up_proj.weight.add_(1)
    found = [[answer(model, one) for _ in range(2)][1] for model in models]
    assert (len(prefills()), replays()) == (3, 3)
    for attachment in (*attachments, models[2]._pitome):
        attachment.update(graph=False)
    for model, made in zip(models, found):
        assert_same(made, answer(model, one))
