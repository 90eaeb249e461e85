"""generate() and forward() with inputs from the ordinary processor: every way of calling, in the caller's lengths."""

from __future__ import annotations

import threading

import pytest
import torch
from checks import assert_merged_like, assert_row, assert_wide_gaps, assert_works, logits, new_ids, reference
from models import (
    BEFORE_518,
    BOS,
    CACHE,
    EOS,
    IMAGE,
    PAD,
    PATCHES,
    QUESTION,
    build,
    build_text_model,
    picture,
    processor,
)
from transformers import DynamicCache, GenerationConfig, TextIteratorStreamer

from pitome_mllm import attach

KEEP = 144
ROWS = [  # pictures and text of each row: 1, 0, 2 adjacent, 2 apart, 1 again
    ([0], QUESTION),
    ([], "USER: how many are there ASSISTANT:"),
    ([1, 2], "USER: <image> <image> what is there in this picture and that one? ASSISTANT:"),
    ([3, 4], "USER: <image> look <image> is the star above or below the circle ASSISTANT:"),
    ([5], "USER: tell me how many big red digit are in the <image> picture here? ASSISTANT:"),
]
# Before 5.18 transformers repeats pictures one by one for beams, so that rows with several get each other's.
REPEATS_PICTURES = BEFORE_518
PLACES = ["tower", "projector", "both"]


def make(rows, padding_side="left"):
    """Inputs of some rows, from the ordinary processor."""
    images = [picture(i) for numbers, _ in rows for i in numbers]
    process = processor(padding_side=padding_side)
    return process(images=images or None, text=[text for _, text in rows], padding=True, return_tensors="pt")


@pytest.fixture(scope="module")
def batch():
    return make(ROWS)


pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default")


@pytest.fixture
def handle(model):
    with attach(model, "pitome", published=True, keep=KEEP) as handle:
        yield handle


# ---- the caller's prompt, and what follows it ------------------------------------------------------------------------


def test_pictures_are_decided_by_wide_gaps(plain, batch, handle):
    assert_wide_gaps(plain, batch, handle.plan.counts)


def test_greedy_answers_equal_the_merge_written_out(model, plain, one, handle):
    expected = reference(plain, one, handle.plan.counts)
    assert new_ids(model, one, 8) == [expected.greedy(0, 8)]
    assert_merged_like(handle, expected.tokens)
    assert expected.greedy(0, 8) != new_ids(plain, one, 8)[0], "the test would prove nothing"


@pytest.mark.parametrize("where", PLACES)
def test_prompt_comes_back_whole(model, one, where):
    with attach(model, "pitome", published=True, keep=KEEP, where=where):
        out = model.generate(**one, max_new_tokens=3, do_sample=False)
        positional = model.generate(
            one["input_ids"],
            attention_mask=one["attention_mask"],
            pixel_values=one["pixel_values"],
            max_new_tokens=3,
            do_sample=False,
        )
    assert torch.equal(out[:, :-3], one["input_ids"])
    assert torch.equal(out, positional)


def shorten(inputs, keep=KEEP):
    """Inputs whose picture already has only ``keep`` placeholders, as a custom processor writes them."""
    ids = inputs["input_ids"][0]
    slots = (ids == IMAGE).nonzero()[:, 0]
    kept = torch.ones(len(ids), dtype=torch.bool)
    kept[slots[keep:]] = False
    return {
        "input_ids": ids[kept][None],
        "attention_mask": inputs["attention_mask"][:, kept],
        "pixel_values": inputs["pixel_values"],
    }


@pytest.mark.parametrize("where", PLACES)
def test_inputs_that_are_already_short(model, one, where):
    short = shorten(one)
    with attach(model, "pitome", published=True, keep=KEEP, where=where):
        assert new_ids(model, short) == new_ids(model, one)
        torch.testing.assert_close(logits(model, short), logits(model, one))


def test_any_other_number_of_placeholders_is_an_error(model, plain, one, handle):
    for wrong in (500, 145, 72):
        with pytest.raises(ValueError, match="(?i)image"):
            model.generate(**shorten(one, wrong), max_new_tokens=2)
        with pytest.raises(ValueError, match="(?i)image"):
            logits(model, shorten(one, wrong))
    assert_works(handle, model, plain, one)  # nothing of the failed calls stays behind
    assert new_ids(model, one) == [reference(plain, one, handle.plan.counts).greedy()]


def test_text_alone_is_the_plain_model(model, plain, process, handle):
    text = process(text=["USER: how many ASSISTANT:", "USER: look at the red one? ASSISTANT:"], padding=True)
    text = text.convert_to_tensors("pt") if not isinstance(text["input_ids"], torch.Tensor) else text
    inputs = {key: torch.as_tensor(text[key]) for key in ("input_ids", "attention_mask")}
    assert torch.equal(logits(model, inputs), logits(plain, inputs))
    assert new_ids(model, inputs) == new_ids(plain, inputs)


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_rows_equal_the_definition(model, plain, side, handle):
    inputs = make(ROWS, side)
    expected = reference(plain, inputs, handle.plan.counts)
    for training in (False, True):  # dropout is 0; the side of the padding must not be guessed from the mode
        model.train(training)
        seen = logits(model, inputs)
        assert_merged_like(handle, expected.tokens)
        for row in range(len(ROWS)):
            assert_row(seen[row], expected.logits(row), side)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("calibration", ["none", "distance"])
def test_batch_rows_equal_the_same_rows_alone(model, batch, where, calibration):
    with attach(model, "pitome", published=True, keep=KEEP, where=where, calibration=calibration) as handle:
        together, groups = new_ids(model, batch), None
        groups, image = handle.stats.groups, 0
        for row, (numbers, text) in enumerate(ROWS):
            alone = make([(numbers, text)])
            assert new_ids(model, alone) == [together[row]], f"row {row}"
            if numbers:
                assert torch.equal(handle.stats.groups, groups[image : image + len(numbers)])
            image += len(numbers)


def test_batch_without_attention_mask(model, batch, handle):
    """generate() infers the mask from the padding, as it does on the plain model."""
    bare = {key: value for key, value in batch.items() if key != "attention_mask"}
    assert new_ids(model, bare) == new_ids(model, batch)


@pytest.mark.parametrize("settings", [{}, {"method": "pitome"}, {"keep": 1.0}], ids=str)
def test_forward_without_attention_mask_takes_every_token_for_one(model, batch, settings):
    """forward() infers none, as it does not on the plain model."""
    bare = {key: value for key, value in batch.items() if key != "attention_mask"}
    with attach(model, **{"keep": KEEP, **settings}):
        seen = logits(model, bare)
        expected = logits(model, {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])})
    torch.testing.assert_close(seen[:, -4:], expected[:, -4:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("said_in", ["call", "config"])
def test_a_pad_token_that_also_ends_answers_is_no_padding(model, plain, one, handle, said_in):
    """Where the pad token may be part of a prompt, transformers infers no mask from it, and neither do we."""
    ids = torch.cat([one["input_ids"], torch.tensor([[PAD]]), one["input_ids"][:, -4:]], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": one["pixel_values"]}
    expected = [reference(plain, inputs, handle.plan.counts).greedy()]
    bare = {key: inputs[key] for key in ("input_ids", "pixel_values")}
    stop = {"eos_token_id": [EOS, PAD]}
    assert new_ids(plain, bare, **stop) == new_ids(plain, inputs, **stop), "no longer true of the plain model"
    if said_in == "config":
        model.generation_config.eos_token_id = [EOS, PAD]
        stop = {}
    assert new_ids(model, bare, **stop) == expected


def test_rows_of_equal_length_with_different_numbers_of_pictures(model, plain, handle):
    """No padding before shortening, but some after it."""
    with_picture = make([ROWS[0]])
    words = (with_picture["input_ids"].shape[1] - 3) * "star "
    inputs = make([ROWS[0], ([], f"USER: {words} ASSISTANT:")])
    assert bool(inputs["attention_mask"].all())
    expected = reference(plain, inputs, handle.plan.counts)
    assert new_ids(model, inputs) == [expected.greedy(0), expected.greedy(1)]
    bare = {key: inputs[key] for key in ("input_ids", "pixel_values")}
    assert new_ids(model, bare) == new_ids(model, inputs)


def test_a_row_that_stops_early(model, plain, pair, handle):
    expected = reference(plain, pair, handle.plan.counts)
    rows = [expected.greedy(0, 8), expected.greedy(1, 8)]
    assert rows[0][1] != rows[1][1], "the test would prove nothing"
    seen = new_ids(model, pair, 8, eos_token_id=rows[0][1])
    for row, out in zip(rows, seen, strict=True):
        cut = row.index(rows[0][1]) + 1 if rows[0][1] in row else 8
        assert out == (row[:cut] + [PAD] * 8)[: len(out)]


# ---- ways of generating ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3},
        {"do_sample": True, "top_k": 8},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_beams_and_samples_equal_the_plain_model_on_merged_features(model, plain, handle, options):
    """The plain model's own generate, given the merged features as embeddings, is the reference."""
    batch = make([row for row in ROWS if len(row[0]) < 2 or not REPEATS_PICTURES])
    options = {"do_sample": False, "max_new_tokens": 6, **options}
    padded = reference(plain, batch, handle.plan.counts).padded()
    torch.manual_seed(0)
    expected = plain.generate(**padded, **options)
    torch.manual_seed(0)
    seen = model.generate(**batch, **options)
    width = batch["input_ids"].shape[1]
    times = options.get("num_return_sequences", 1)
    assert torch.equal(seen[:, :width], batch["input_ids"].repeat_interleave(times, 0))
    assert torch.equal(seen[:, width:], expected)


@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static"}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}],
    ids=str,
)
@pytest.mark.parametrize("calibration", ["none", "distance"])
def test_caches_and_lookup_do_not_change_the_answer(model, one, options, calibration):
    with attach(model, "pitome", published=True, keep=KEEP, calibration=calibration) as handle:
        expected = new_ids(model, one, 8)
        assert new_ids(model, one, 8, **options) == expected
        assert handle.stats.tokens_after == KEEP


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_caches_with_a_batch(model, batch, handle, options):
    assert new_ids(model, batch, 4, **options) == new_ids(model, batch, 4)


NEEDS_FEATURES = pytest.mark.skipif(
    REPEATS_PICTURES,
    reason="before 5.18 transformers hands the pixels to the assistant, which a text model refuses",
)


@pytest.mark.parametrize("calibration", ["none", "distance"])
@pytest.mark.parametrize(
    "assistant",
    ["attached", pytest.param("plain", marks=NEEDS_FEATURES), pytest.param("text", marks=NEEDS_FEATURES)],
)
def test_assisted_generation(model, one, assistant, calibration):
    draft = build_text_model() if assistant == "text" else build(seed=1 if assistant == "attached" else 3)
    with attach(model, "pitome", published=True, keep=KEEP, calibration=calibration):
        expected = new_ids(model, one, 8)
        if assistant == "attached":
            attach(draft, "pitome", published=True, keep=KEEP, calibration=calibration)
        assert new_ids(model, one, 8, assistant_model=draft) == expected


@pytest.mark.parametrize("skip_prompt", [True, False])
def test_streamer(model, one, process, skip_prompt):
    streamer = TextIteratorStreamer(process.tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True, timeout=60)
    with attach(model, "pitome", published=True, keep=KEEP):
        out = model.generate(**one, max_new_tokens=8, do_sample=False)
        options = {**one, "max_new_tokens": 8, "do_sample": False, "streamer": streamer}
        thread = threading.Thread(target=model.generate, kwargs=options)
        thread.start()
        said = "".join(streamer)
        thread.join()
    start = one["input_ids"].shape[1] if skip_prompt else 0
    assert said.split() == process.tokenizer.decode(out[0, start:], skip_special_tokens=True).split()


def test_return_dict(model, plain, one, handle):
    out = model.generate(
        **one, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True, output_scores=True
    )
    assert torch.equal(out.sequences[:, :-5], one["input_ids"])
    assert len(out.logits) == len(out.scores) == 5
    expected = reference(plain, one, handle.plan.counts)
    assert out.sequences[0, -5:].tolist() == expected.greedy(0, 5)
    assert_row(out.logits[0], expected.logits()[-1:])
    short = one["input_ids"].shape[1] - PATCHES + KEEP
    assert out[CACHE].get_seq_length() == short + 4  # the saving is real
    beams = model.generate(**one, max_new_tokens=5, num_beams=2, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(beams.sequences[:, :-5], one["input_ids"])


# ---- lengths are the caller's ----------------------------------------------------------------------------------------


def test_max_length_counts_the_callers_prompt(model, one, handle):
    width = one["input_ids"].shape[1]
    assert model.generate(**one, max_length=width + 5, do_sample=False).shape[1] == width + 5
    assert model.generate(**one, generation_config=GenerationConfig(max_length=width + 4)).shape[1] == width + 4
    model.generation_config.max_length = width + 3
    assert model.generate(**one, do_sample=False).shape[1] == width + 3
    assert model.generation_config.max_length == width + 3


def test_a_generation_config_of_the_caller_is_not_changed(model, one, handle):
    width = one["input_ids"].shape[1]
    settings = GenerationConfig(max_length=width + 4, min_length=width + 2)
    before = settings.to_dict()
    model.generate(**one, generation_config=settings)
    assert settings.to_dict() == before


def test_the_default_length_is_the_plain_one(model, plain, one, handle):
    assert model.generate(**one).shape == plain.generate(**one).shape


def test_min_length_counts_the_callers_prompt(model, plain, one, handle):
    width = one["input_ids"].shape[1]
    stop = reference(plain, one, handle.plan.counts).greedy(0, 1)[0]
    options = {"do_sample": False, "eos_token_id": stop, "max_length": width + 8}
    assert model.generate(**one, **options).shape[1] == width + 1
    kept = model.generate(**one, **options, min_length=width + 3)[0, width:].tolist()
    assert stop not in kept[:3] and len(kept) >= 3
    padded = reference(plain, one, handle.plan.counts).padded()
    options |= {"max_length": None, "max_new_tokens": 8}
    assert kept == plain.generate(**padded, **options, min_new_tokens=3)[0].tolist()


# ---- embeddings, labels ----------------------------------------------------------------------------------------------


def embedded(model, inputs):
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
    return {
        "inputs_embeds": embeddings,
        "attention_mask": inputs["attention_mask"],
        "pixel_values": inputs["pixel_values"],
    }


@pytest.mark.parametrize("side", ["left", "right"])
def test_inputs_embeds_in_forward(model, plain, handle, side):
    inputs = make(ROWS, side)
    expected = reference(plain, inputs, handle.plan.counts)
    seen = logits(model, embedded(model, inputs))
    for row in range(len(ROWS)):
        assert_row(seen[row], expected.logits(row), side)


def test_inputs_embeds_in_generate(model, batch, handle):
    expected = new_ids(model, batch)
    assert model.generate(**embedded(model, batch), max_new_tokens=6, do_sample=False).tolist() == expected
    both = {**embedded(model, batch), "input_ids": batch["input_ids"]}
    assert new_ids(model, both) == expected
    width = batch["input_ids"].shape[1]  # max_length counts the caller's embeddings
    assert model.generate(**embedded(model, batch), max_length=width + 4, do_sample=False).shape[1] == 4


def test_embeddings_without_pictures_are_left_alone(model, plain, one, handle):
    embeddings = {**embedded(plain, one)}
    del embeddings["pixel_values"]
    assert torch.equal(logits(model, embeddings), logits(plain, embeddings))


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_give_the_loss_of_the_merged_prompt(model, plain, handle, side):
    inputs = make(ROWS, side)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    labels = labels.masked_fill(inputs["input_ids"] == BOS, -100)  # nothing stands in front of it but padding
    labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    expected, losses = reference(plain, inputs, handle.plan.counts), []
    for row in range(len(ROWS)):
        kept = labels[row, expected.caller[row]]
        losses.append(
            torch.nn.functional.cross_entropy(expected.logits(row)[:-1], kept[1:], ignore_index=-100, reduction="none")[
                kept[1:] != -100
            ]
        )
    with torch.no_grad():
        seen = model(**inputs, labels=labels).loss
    torch.testing.assert_close(seen.double(), torch.cat(losses).mean(), atol=1e-4, rtol=1e-4)


def test_hidden_states_have_the_length_of_the_merged_prompt(model, one, handle):
    with torch.no_grad():
        out = model(**one, output_hidden_states=True)
    short = one["input_ids"].shape[1] - PATCHES + KEEP
    assert [x.shape[1] for x in out.hidden_states] == [short] * 3
    assert torch.cat([*out.image_hidden_states]).numel() == KEEP * 64  # from transformers 5.24 on a list of pictures
    torch.testing.assert_close(out.logits, logits(model, one))


def test_position_ids_of_the_caller_are_recomputed(model, one, handle):
    positions = torch.arange(one["input_ids"].shape[1])[None]
    torch.testing.assert_close(logits(model, one, position_ids=positions), logits(model, one))
    assert new_ids(model, one, position_ids=positions) == new_ids(model, one)


# ---- several turns ---------------------------------------------------------------------------------------------------


def follow_up(process, text, images=None):
    """The ids of a further turn (no <s>), and its pictures."""
    inputs = process(images=images, text=text, return_tensors="pt")
    return inputs["input_ids"][:, 1:], inputs.get("pixel_values")


def say(model, conversation, text, past, steps=4, **options):
    """One more turn: the caller's whole conversation so far, with the cache of the last turn."""
    ids = torch.cat([conversation, text.expand(len(conversation), -1)], 1)
    mask = options.pop("mask", torch.ones_like(ids))
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        **{CACHE: past},
        max_new_tokens=steps,
        do_sample=False,
        return_dict_in_generate=True,
        **options,
    )
    assert torch.equal(out.sequences[:, : ids.shape[1]], ids)
    return out


def test_three_turns_on_one_picture(model, plain, one, process, handle):
    expected = reference(plain, one, handle.plan.counts)
    out = model.generate(**one, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    said = out.sequences[0, one["input_ids"].shape[1] :]
    assert said.tolist() == expected.greedy(0, 4)
    for question in ("USER: how many are there ASSISTANT:", "USER: is it red ASSISTANT:"):
        text, _ = follow_up(process, question)
        out = say(model, out.sequences, text, out[CACHE])
        said = torch.cat([said, text[0]])
        answer = out.sequences[0, -4:]
        assert answer.tolist() == expected.greedy(0, 4, said)
        said = torch.cat([said, answer])


@pytest.mark.parametrize("change", [{}, {"keep": 72}, {"keep": PATCHES}, {"where": "projector"}], ids=str)
def test_a_cache_of_the_caller_keeps_its_layout(model, plain, one, process, handle, change):
    """One cache object through all turns, and other settings for later pictures, which change nothing in it."""
    past, expected = DynamicCache(), reference(plain, one, handle.plan.counts)
    out = model.generate(**one, **{CACHE: past}, max_new_tokens=4, do_sample=False)
    handle.update(**change)
    text, _ = follow_up(process, "USER: how many are there ASSISTANT:")
    second = say(model, out, text, past)
    said = torch.cat([out[0, one["input_ids"].shape[1] :], text[0]])
    assert second.sequences[0, -4:].tolist() == expected.greedy(0, 4, said)


@pytest.mark.parametrize("words", [0, 2])
def test_a_cropped_cache(model, plain, one, process, handle, words):
    """Forget an answer, and ``words`` of the question, and say something else."""
    short = {key: one[key][:, : one[key].shape[1] - words] for key in ("input_ids", "attention_mask")}
    expected = reference(plain, {**one, **short}, handle.plan.counts)
    out = model.generate(**one, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    out[CACHE].crop(-3 - words)  # of the four new ids the last was never fed back
    text, _ = follow_up(process, "USER: is it red ASSISTANT:")
    second = say(model, short["input_ids"], text, out[CACHE])
    assert second.sequences[0, -4:].tolist() == expected.greedy(0, 4, text[0])


def test_a_plain_first_turn_stays_plain(model, plain, one, process, handle):
    text, _ = follow_up(process, "USER: how many are there ASSISTANT:")
    answers = []
    for asked in (plain, model):
        with handle.using(None):
            out = asked.generate(**one, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        answers.append(say(asked, out.sequences, text, out[CACHE]).sequences)
    assert torch.equal(*answers)


def test_a_new_picture_in_the_second_turn(model, plain, one, process, handle):
    out = model.generate(**one, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    text, pixels = follow_up(process, "USER: <image> how many now? ASSISTANT:", [picture(1)])
    second = say(model, out.sequences, text, out[CACHE], pixel_values=pixels)
    whole = {
        "input_ids": torch.cat([out.sequences, text], 1),
        "attention_mask": torch.ones(1, out.sequences.shape[1] + text.shape[1], dtype=torch.long),
        "pixel_values": torch.cat([one["pixel_values"], pixels]),
    }
    assert second.sequences[0, -4:].tolist() == reference(plain, whole, handle.plan.counts).greedy(0, 4)


def test_two_turns_of_a_padded_batch(model, plain, process, handle):
    inputs = make(ROWS[2:])
    expected = reference(plain, inputs, handle.plan.counts)
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    text, _ = follow_up(process, "USER: and the circle ASSISTANT:")
    added = torch.ones(len(inputs["input_ids"]), 4 + text.shape[1], dtype=torch.long)
    mask = torch.cat([inputs["attention_mask"], added], 1)
    second = say(model, out.sequences, text, out[CACHE], mask=mask)
    width = inputs["input_ids"].shape[1]
    for row in range(len(mask)):
        said = torch.cat([out.sequences[row, width:], text[0]])
        assert second.sequences[row, -4:].tolist() == expected.greedy(row, 4, said)


@pytest.mark.parametrize("rows,with_mask", [([0], False), ([0], True), ([2, 3, 4], True)])
def test_a_decoding_loop_written_by_hand(model, plain, handle, with_mask, rows):
    inputs = make([ROWS[row] for row in rows])
    expected = reference(plain, inputs, handle.plan.counts)
    mask, said = inputs["attention_mask"], []
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        for _ in range(6):
            said.append(out.logits[:, -1].argmax(-1, keepdim=True))
            mask = torch.cat([mask, torch.ones_like(said[-1])], 1)
            options = {"attention_mask": mask} if with_mask else {}
            out = model(input_ids=said[-1], **{CACHE: out[CACHE]}, use_cache=True, **options)
    assert torch.cat(said, 1).tolist() == [expected.greedy(row) for row in range(len(rows))]
