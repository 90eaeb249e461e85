"""What people do with such models, and what has worked from the first: it goes on working with merging on."""

from __future__ import annotations

import gc
import threading
from collections import Counter

import pytest
import torch
from checks import logits, new_ids
from models import QUESTION, build, picture, processor
from transformers import pipeline

from pitome_mllm import attach

KEEP = 144
WORDS = torch.tensor([[1, 10, 11]])
SETTINGS = [{}, {"method": "pitome"}]
both = pytest.mark.parametrize("settings", SETTINGS, ids=str)


def close(seen, expected):
    torch.testing.assert_close(seen, expected, atol=2e-5, rtol=1e-5, check_dtype=False)


# ---- generate() ------------------------------------------------------------------------------------------------------


@both
def test_guidance(model, one, settings):
    """Log-probabilities of the prompt, away from those of its last token alone, or of a prompt without a picture."""
    options = dict(max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True)
    options |= dict(output_scores=True, guidance_scale=2.0)
    negative = {"negative_prompt_ids": WORDS, "negative_prompt_attention_mask": torch.ones_like(WORDS)}
    with attach(model, **settings, keep=KEEP) as handle, torch.no_grad():
        given = logits(model, one)[:, -1].log_softmax(-1)
        for ids, more in ((one["input_ids"][:, -1:], {}), (WORDS, negative)):
            with handle.using(None):
                without = model(input_ids=ids).logits[:, -1].log_softmax(-1)
            seen = model.generate(**one, **more, **options).scores[0]
            close(seen, 2 * given - without)


@both
def test_scores_of_beams(model, one, settings):
    """The transition scores of an answer, as they come with it, are those of forward."""
    options = dict(num_beams=3, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_scores=True)
    with attach(model, **settings, keep=KEEP, logits="caller"), torch.no_grad():
        out = model.generate(**one, **options)
        scores = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices, normalize_logits=False)
        whole = {"input_ids": out.sequences, "pixel_values": one["pixel_values"]}
        said = out.sequences[:, one["input_ids"].shape[1] :]
        seen = logits(model, whole)[:, -len(said[0]) - 1 : -1].log_softmax(-1).gather(2, said[..., None])[..., 0]
        close(scores, seen)


@both
def test_a_pipeline(model, one, settings):
    ask = pipeline("image-text-to-text", model=model, processor=processor())
    with attach(model, **settings, keep=KEEP) as handle:
        seen = ask(images=picture(0), text=QUESTION, max_new_tokens=4, do_sample=False, return_full_text=False)
        assert handle.stats.tokens_after == KEEP
        assert seen[0]["generated_text"].split() == processor().decode(new_ids(model, one, 4)[0]).split()


def test_threads_with_settings_of_their_own(model, one):
    keeps, seen = (36, 72, 144, 576), {}
    start = threading.Barrier(len(keeps))

    def ask(handle, keep):
        with handle.using(keep=keep):
            start.wait()
            seen[keep] = [(logits(model, one)[:, -1], handle.stats.tokens_after) for _ in range(2)]

    with attach(model, "pitome", published=True, keep=KEEP) as handle:
        threads = [threading.Thread(target=ask, args=(handle, keep)) for keep in keeps]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for keep in keeps:
            with handle.using(keep=keep):
                expected = logits(model, one)[:, -1]
            for found, tokens in seen[keep]:
                assert tokens == keep
                close(found, expected)


def test_many_calls_leave_nothing(model, one):
    """No kind of object grows in number with every call."""
    small = build(layers=3, dtype=torch.float32)

    def census():
        gc.collect()
        return Counter(type(x).__name__ for x in gc.get_objects())

    def grown(calls=6):
        before = census()
        for _ in range(calls):
            logits(small, one)
            small.generate(**one, max_new_tokens=1, do_sample=False)
        return {name for name, count in (census() - before).items() if count >= calls}

    with attach(small, keep=KEEP):
        kinds = [grown() for _ in range(3)]  # what is made once, in whichever call, is in one of them
    assert not set.intersection(*kinds), kinds


# ---- traces, wrappers and kinds of model -----------------------------------------------------------------------------


class Features(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixels):
        return self.model.get_image_features(pixels).pooler_output[0]


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask, pixels):
        return self.model(input_ids=ids, attention_mask=mask, pixel_values=pixels, use_cache=False).logits


def traced(module, inputs):
    return torch.jit.trace(module, inputs, check_trace=False)


def exported(module, inputs):
    return torch.export.export(module, inputs, strict=False).module()


@both
@pytest.mark.parametrize("record", [traced, exported])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_recorded_image_features(model, pair, settings, record):
    """A graph recorded with one picture serves another."""
    first, second = pair["pixel_values"].double().split(1)
    with attach(model, **settings, keep=KEEP), torch.no_grad():
        graph = record(Features(model), (first,))
        expected = Features(model)(second)
        assert len(expected) == KEEP
        close(graph(second), expected)


@both
@pytest.mark.parametrize("short", [False, True])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced_model(model, pair, settings, short):
    ids, pixels = pair["input_ids"][:1], pair["pixel_values"].split(1)
    image = ids[0] == model.config.image_token_id
    ids = ids[:, ~image | (image.cumsum(0) <= KEEP)] if short else ids
    with attach(model, **settings, keep=KEEP), torch.no_grad():
        graph = traced(Logits(model), (ids, torch.ones_like(ids), pixels[0]))
        close(graph(ids, torch.ones_like(ids), pixels[1]), Logits(model)(ids, torch.ones_like(ids), pixels[1]))


@both
def test_fsdp1(model, one, settings, tmp_path):
    from torch import distributed
    from torch.distributed.fsdp import FullyShardedDataParallel

    with attach(model, **settings, keep=KEEP) as handle:
        expected = logits(model, one)
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
            close(logits(wrapped, one), expected)
            assert handle.stats.tokens_after == KEEP
        finally:
            distributed.destroy_process_group()


@both
def test_features_of_four_layers(settings):
    """Granite Vision reads four layers of the tower, one after the other in every token."""
    small = build(layers=5, feature_layer=[-4, -3, -2, -1], strategy="full", tower="siglip")
    inputs = processor("full", class_token=False)(images=[picture(0)], text=QUESTION, return_tensors="pt")
    with attach(small, **settings, keep=KEEP) as handle:
        found = small.get_image_features(inputs["pixel_values"].double()).pooler_output[0]
        assert found.shape == (KEEP, 64)
        options = dict(max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True)
        close(small.generate(**inputs, **options).logits[0], logits(small, inputs)[:, -1])
        assert handle.stats.tokens_after == KEEP
