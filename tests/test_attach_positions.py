"""What merged tokens are to the LLM: each at the place that its group's first token had, each weighing its size."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from by_hand import Reference, Tokens
from checks import assert_row, logits, new_ids, reference
from models import CACHE, IMAGE, PATCHES, QUESTION, build, config, picture, processor

from pitome_mllm import attach
from pitome_mllm.hooks import masks

ROWS = [
    ([0], QUESTION),
    ([], "USER: how many are there ASSISTANT:"),
    ([1, 2], "USER: <image> <image> what is there in this picture and that one? ASSISTANT:"),
    ([5], "USER: tell me how many big red digit are in the <image> picture here? ASSISTANT:"),
]


SETTINGS = [{"calibration": "size"}, {"calibration": "distance"}]


@pytest.fixture(params=SETTINGS, ids=str)
def handle(model, request):
    with attach(model, "pitome", published=True, keep=144, **request.param) as handle:
        yield handle


def make(rows, side="left"):
    images = [picture(i) for numbers, _ in rows for i in numbers]
    text = [text for _, text in rows]
    return processor(padding_side=side)(images=images or None, text=text, padding=True, return_tensors="pt")


def expect(plain, inputs, handle):
    plan = handle.plan
    return reference(plain, inputs, plan.counts, calibration=plan.calibration)


def test_forward_and_generate(model, plain, one, handle, monkeypatch):
    monkeypatch.setattr(masks, "TABLE", 1)  # every step looks further than the one before
    expected = expect(plain, one, handle)
    assert_row(logits(model, one)[0], expected.logits())
    assert new_ids(model, one, 8) == [expected.greedy(0, 8)]
    compact = reference(plain, one, handle.plan.counts)
    assert (compact.logits()[-1] - expected.logits()[-1]).abs().max() > 1e-3, "the test would prove nothing"


@pytest.mark.parametrize("use_cache", [True, False])
def test_gaps_between_positions_are_no_new_sequences(model, plain, one, handle, use_cache):
    """Without an attention mask transformers takes jumping position ids for several sequences packed into one."""
    bare = {key: one[key] for key in ("input_ids", "pixel_values")}
    assert_row(logits(model, bare, use_cache=use_cache)[0], expect(plain, one, handle).logits())
    assert new_ids(model, bare, use_cache=use_cache) == [expect(plain, one, handle).greedy()]


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches(model, plain, handle, side):
    inputs = make(ROWS, side)
    expected = expect(plain, inputs, handle)
    seen = logits(model, inputs)
    for row in range(len(ROWS)):
        assert_row(seen[row], expected.logits(row), side)
    if side == "left":
        assert new_ids(model, inputs) == [expected.greedy(row) for row in range(len(ROWS))]


def test_beams_repeat_the_positions_of_their_row(model, plain, handle):
    inputs = make(ROWS)
    together = model.generate(**inputs, num_beams=3, max_new_tokens=5, do_sample=False)[:, -5:].tolist()
    for row, settings in enumerate(ROWS):
        alone = make([settings])
        assert model.generate(**alone, num_beams=3, max_new_tokens=5, do_sample=False)[0, -5:].tolist() == together[row]
    three = model.generate(**inputs, num_beams=3, num_return_sequences=3, max_new_tokens=5, do_sample=False)
    assert three[::3, -5:].tolist() == together


ROPES = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    {"rope_type": "dynamic", "factor": 4.0},  # which grows with the prompt
    {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 16, "long_factor": [3.0] * 16}
    | {"original_max_position_embeddings": 256},
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_distances_are_those_of_the_models_own_frequencies(one, rope):
    text = config().text_config.to_dict() | {"rope_parameters": {"rope_theta": 1e4, **rope}}
    text |= {"max_position_embeddings": 256}
    model, plain = build(text=text), build(text=text)
    with attach(model, "pitome", published=True, keep=144, calibration="distance") as handle:
        seen = logits(model, one)[0]
        expected = expect(plain, one, handle)
        expected.logits()  # this prompt decides about frequencies
        assert_row(seen, expected.logits())
        usual = reference(build(), one, handle.plan.counts, calibration="distance").term([0, 500], [1, 1])
        assert (expected.term([0, 500], [1, 1])[1] - usual[1]).abs().max() > 1e-3, "the test would prove nothing"


def test_a_table_is_as_long_as_its_call_asks_whatever_other_threads_leave(model):
    class Shared(dict):
        def get(self, kind):
            return None, torch.empty(0)  # another thread was last

    handle = SimpleNamespace(distances=Shared())
    language = SimpleNamespace(_pitome=handle, rotary_emb=model.model.language_model.rotary_emb)
    assert len(masks.distances(language, torch.zeros(1, 1).long(), 9, "full_attention")) > 9


def test_text_in_front_of_a_picture_is_what_it_is_without_one(model, plain, handle):
    """So a cache of it can be continued with a picture, and one of both without, whatever call brings the picture."""
    inputs = make([([0], "USER: how many are there in <image> ASSISTANT:")])
    start = int((inputs["input_ids"][0] == IMAGE).nonzero()[0])
    front = {name: inputs[name][:, :start] for name in ("input_ids", "attention_mask")}
    expected = expect(plain, inputs, handle).logits()
    assert_row(logits(plain, front)[0], expected[:start])
    with torch.no_grad():
        past = model(**front, use_cache=True)[CACHE]
        rest = model(**{**inputs, "input_ids": inputs["input_ids"][:, start:]}, **{CACHE: past}).logits
    assert_row(rest[0], expected[start:])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("method,where", [("pitome", "projector"), ("pitome", "both"), ("random", "tower")])
def test_other_places_and_dropping(model, plain, one, method, where, settings):
    """The reference takes groups from the stats here, and features from the model itself."""
    with attach(model, method, keep=144, where=where, **settings) as handle:
        seen = logits(model, one)
        with torch.no_grad():
            features = model.model.get_image_features(one["pixel_values"], return_dict=True).pooler_output
        tokens = Tokens(torch.stack(list(features)), handle.stats.groups, handle.stats.sizes)
        expected = Reference(plain, one, tokens, **settings)
        assert_row(seen[0], expected.logits())
        assert new_ids(model, one) == [expected.greedy()]


def test_several_turns_continue_from_the_last_position(model, plain, one, process, handle):
    expected = expect(plain, one, handle)
    out = model.generate(**one, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    said = out.sequences[0, one["input_ids"].shape[1] :]
    for question in ("USER: how many are there ASSISTANT:", "USER: is it red ASSISTANT:"):
        text = process(text=question, return_tensors="pt")["input_ids"][:, 1:]
        ids = torch.cat([out.sequences, text], 1)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **{CACHE: out[CACHE]},
            max_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
        )
        said = torch.cat([said, text[0]])
        answer = out.sequences[0, ids.shape[1] :]
        assert answer.tolist() == expected.greedy(0, 4, said)
        said = torch.cat([said, answer])


def test_several_turns_of_a_padded_batch(model, plain, process, handle):
    inputs = make(ROWS[2:])
    expected = expect(plain, inputs, handle)
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    text = process(text="USER: and the circle ASSISTANT:", return_tensors="pt")["input_ids"][:, 1:]
    ids = torch.cat([out.sequences, text.expand(2, -1)], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 4 + text.shape[1], dtype=torch.long)], 1)
    second = model.generate(
        input_ids=ids, attention_mask=mask, **{CACHE: out[CACHE]}, max_new_tokens=4, do_sample=False
    )
    for row in range(2):
        said = torch.cat([out.sequences[row, inputs["input_ids"].shape[1] :], text[0]])
        assert second[row, -4:].tolist() == expected.greedy(row, 4, said)


def test_a_decoding_loop_written_by_hand(model, plain, one, handle):
    """The attention mask in the caller's length says where the next token stands."""
    mask, said = one["attention_mask"], []
    with torch.no_grad():
        out = model(**one, use_cache=True)
        for _ in range(6):
            said.append(out.logits[:, -1].argmax(-1, keepdim=True))
            mask = torch.cat([mask, torch.ones_like(said[-1])], 1)
            out = model(input_ids=said[-1], **{CACHE: out[CACHE]}, attention_mask=mask, use_cache=True)
    assert torch.cat(said, 1)[0].tolist() == expect(plain, one, handle).greedy()


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_caches_do_not_change_the_answer(model, handle, options):
    inputs = make(ROWS)
    assert new_ids(model, inputs, **options) == new_ids(model, inputs)


@pytest.mark.parametrize("words", [0, 2])
def test_a_cropped_cache(model, plain, one, process, handle, words):
    """Forget an answer, and ``words`` of the question, and say something else."""
    short = {key: one[key][:, : one[key].shape[1] - words] for key in ("input_ids", "attention_mask")}
    expected = expect(plain, {**one, **short}, handle)
    out = model.generate(**one, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    out[CACHE].crop(-3 - words)  # of the four new ids the last was never fed back
    text = process(text="USER: is it red ASSISTANT:", return_tensors="pt")["input_ids"][:, 1:]
    ids = torch.cat([short["input_ids"], text], 1)
    second = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **{CACHE: out[CACHE]},
        max_new_tokens=4,
        do_sample=False,
    )
    assert second[0, -4:].tolist() == expected.greedy(0, 4, text[0])


def test_a_text_only_call_between_pictures_is_plain(model, plain, one, process, handle):
    """What weighs in one call must not reach the cache of the next."""
    text = process(text="USER: how many are there ASSISTANT:", return_tensors="pt")
    logits(model, one)
    model.model.language_model(inputs_embeds=model.get_input_embeddings()(text["input_ids"]))
    assert torch.equal(logits(model, text), logits(plain, text))
    assert new_ids(model, text) == new_ids(plain, text)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_keeping_all_is_the_plain_model(model, plain, settings):
    inputs = make(ROWS)
    with attach(model, keep=PATCHES, **settings):
        assert torch.equal(logits(model, inputs), logits(plain, inputs))
        assert new_ids(model, inputs) == new_ids(plain, inputs)
