"""KV caches, position ids and chunks: whatever callers do between two calls, two ways to the same place agree."""

from __future__ import annotations

import copy
import io
import warnings
from dataclasses import replace

import pytest
import torch
from checks import logits, new_ids
from families import BY_TITLE, QUESTIONS, TWO_PICTURES, pictures
from models import CACHE, IMAGE, PAD, QUESTION, picture, processor, since_518
from transformers import ContinuousBatchingConfig, DynamicCache, LogitsProcessorList, StaticCache

from pitome_mllm import attach
from pitome_mllm.hooks import caches
from pitome_mllm.hooks.layout import unchanged

KEEP = 144
SETTINGS = [{"calibration": "none"}, {"calibration": "size"}, {"calibration": "distance"}]
TOLD = SETTINGS[2]
ROWS = [
    ([0], QUESTION),
    ([1, 2], "USER: <image> <image> what is there in this picture and that one? ASSISTANT:"),
    ([], "USER: how many are there ASSISTANT:"),
]
NEXT = torch.tensor([[7, 8, 9], [10, 11, 12], [13, 14, 15]])


@pytest.fixture(params=[SETTINGS[0], TOLD], ids=str)
def handle(model, request):
    with torch.no_grad(), attach(model, "pitome", published=True, keep=KEEP, **request.param) as handle:
        yield handle


@pytest.fixture
def told(model):
    with torch.no_grad(), attach(model, "pitome", published=True, keep=KEEP, **TOLD) as handle:
        yield handle


def make(rows, side="left"):
    images = [picture(i) for numbers, _ in rows for i in numbers]
    return processor(padding_side=side)(
        images=images, text=[text for _, text in rows], padding=True, return_tensors="pt"
    )


def close(seen, expected):
    torch.testing.assert_close(seen, expected, atol=2e-5, rtol=1e-5)


def step_logits(model, inputs, steps=2, **options):
    """(B, steps, V) what generate() chose from."""
    out = model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return torch.stack(out.logits, 1)


def filled(model, inputs, **options):
    return getattr(model(**inputs, use_cache=True, **options), CACHE)


def go_on(model, past, mask=None, rows=(0, 1, 2), ids=NEXT):
    rows = list(rows)
    if mask is not None:
        mask = torch.cat([mask[rows], torch.ones_like(ids[rows])], 1)
    return model(input_ids=ids[rows], attention_mask=mask, **{CACHE: past}).logits


# ---- a prompt in chunks ----------------------------------------------------------------------------------------------


@since_518
@pytest.mark.parametrize("title", ["LLaVA-1.5", "LLaVA-NeXT (1.6)", "LLaVA-OneVision", "SmolVLM"])
def test_a_prompt_in_chunks(title):
    family = BY_TITLE[title]
    model, inputs = family.build(), family.process([(QUESTIONS[0], pictures(0)), (TWO_PICTURES, pictures(1, 2))])
    with attach(model, keep=0.25):
        close(step_logits(model, inputs, prefill_chunk_size=20), step_logits(model, inputs))


@since_518
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_chunks_of_a_batch(model, handle, options):
    inputs = make(ROWS)
    assert new_ids(model, inputs, prefill_chunk_size=50, **options) == new_ids(model, inputs, **options)


@since_518
def test_chunks_are_refused_where_tokens_see_both_ways():
    family = BY_TITLE["PaliGemma"]
    model, inputs = family.build(), family.process([(QUESTIONS[0], pictures(0))])
    with attach(model, keep=0.25):
        with pytest.raises(ValueError, match="prefill_chunk_size=20.*PaliGemma"):
            step_logits(model, inputs, prefill_chunk_size=20)
        close(step_logits(model, inputs, prefill_chunk_size=1000), step_logits(model, inputs))


# ---- samples packed into a row ---------------------------------------------------------------------------------------


def pack(samples):
    ids = [sample["input_ids"] for sample in samples]
    return {
        "input_ids": torch.cat(ids, 1),
        "position_ids": torch.cat([torch.arange(x.shape[1]) for x in ids])[None],
        "pixel_values": torch.cat([sample["pixel_values"] for sample in samples if "pixel_values" in sample]),
    }


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@torch.no_grad()
def test_packed_samples_are_kept_apart(model, settings):
    one, other = make(ROWS[:1]), make([([1], "USER: <image> how many big red star are there? ASSISTANT:")])
    text = dict(processor()(text=ROWS[2][1], return_tensors="pt"))
    short, long = pack([other, one]), pack([one, other, make([([2], QUESTION)]), text])
    missing = long["input_ids"].shape[1] - short["input_ids"].shape[1]
    for name, fill in (("input_ids", PAD), ("position_ids", 0)):
        short[name] = torch.nn.functional.pad(short[name], (0, missing), value=fill)
    batch = {name: torch.cat([long[name], short[name]]) for name in long}
    with attach(model, "pitome", published=True, keep=KEEP, **settings):
        expected = [logits(model, sample)[0] for sample in (one, other)]
        seen = logits(model, long, use_cache=False)[0]
        length = len(expected[0])
        close(seen[:length], expected[0])
        close(seen[length : length + len(expected[1])], expected[1])
        alone = logits(model, text)[0]  # no picture, so that nothing is told
        close(seen[-len(alone) :], alone)
        seen = logits(model, batch, use_cache=False)[1]  # in a row of other length
        found = [(row - expected[1][-1]).abs().max() < 1e-4 for row in seen]
        assert sum(found) == 1


def test_positions_that_restart_behind_a_cache_are_refused(model, handle):
    inputs = make(ROWS[:1])
    with pytest.raises(ValueError, match="position_ids that restart"):
        model(input_ids=NEXT[:1], **{CACHE: filled(model, inputs)}, position_ids=torch.tensor([[0, 0, 1]]))
    with pytest.raises(ValueError, match="position_ids of shape"):
        model(**inputs, position_ids=torch.arange(7)[None])


# ---- what callers do to a cache --------------------------------------------------------------------------------------


def through_a_file(past):
    file = io.BytesIO()
    torch.save(past, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def repeat_and_select(past):
    past.batch_repeat_interleave(2)
    past.batch_select_indices(torch.tensor([5, 0]))


@pytest.mark.parametrize(
    "change,rows",
    [
        (lambda past: past.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
        (lambda past: past.batch_select_indices(torch.tensor([1])), [1]),
        (repeat_and_select, [2, 0]),
    ],
    ids=["reorder", "select", "repeat"],
)
def test_marks_follow_their_rows(model, handle, change, rows):
    inputs = make(ROWS)
    past = filled(model, inputs)
    expected = go_on(model, copy.deepcopy(past), inputs["attention_mask"])
    for twin in (copy.deepcopy(past), through_a_file(past)):
        change(twin)
        close(go_on(model, twin, inputs["attention_mask"], rows), expected[rows])
    close(go_on(model, past, inputs["attention_mask"]), expected)


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_cache_that_was_reset_is_a_new_one(model, told, by_layer):
    new = StaticCache(config=model.config.get_text_config(), max_cache_len=400)
    filled(model, make(ROWS[:1]), **{CACHE: new})
    for part in new.layers if by_layer else [new]:
        part.reset()
    told.update(calibration="none")
    second = make([([1], QUESTION)])
    assert new_ids(model, second, **{CACHE: new}) == new_ids(model, second)


@pytest.mark.parametrize("left", ["<s> USER:", "<s> USER: <image>"])
def test_a_cache_cropped_to_a_picture(model, handle, left):
    """What is left of the caller's columns is what stands in front of the first place that is gone."""
    inputs = make(ROWS[:1])
    image = (inputs["input_ids"][0] == IMAGE).nonzero()
    columns = int(image[-1]) + 1 if "<image>" in left else int(image[0])
    past = filled(model, inputs)
    past.crop(-(past.get_seq_length() - columns if "<image>" not in left else inputs["input_ids"].shape[1] - columns))
    again = {**inputs, "input_ids": inputs["input_ids"][:, columns:]}
    if "<image>" in left:
        del again["pixel_values"]
    close(model(**again, **{CACHE: past}).logits[:, -4:], logits(model, inputs)[:, -4:])


@pytest.mark.parametrize("with_mask", [False, True])
def test_text_goes_on_behind_a_picture(model, handle, with_mask):
    inputs = make(ROWS[:1])
    end = int((inputs["input_ids"][0] == IMAGE).nonzero()[-1]) + 1
    past = filled(model, {"input_ids": inputs["input_ids"][:, :end], "pixel_values": inputs["pixel_values"]})
    mask = {"attention_mask": inputs["attention_mask"]} if with_mask else {}
    seen = model(input_ids=inputs["input_ids"][:, end:], **{CACHE: past}, **mask).logits
    close(seen, logits(model, inputs)[:, -seen.shape[1] :])


def test_gaps_in_the_positions_of_a_short_prompt_part_no_samples(model, told, one):
    """They are those that images leave, as its caller may count them."""
    image = one["input_ids"][0] == IMAGE
    stays = ~image | (image.cumsum(0) <= KEEP)
    short = {"input_ids": one["input_ids"][:, stays], "pixel_values": one["pixel_values"]}
    counted = {**short, "position_ids": stays.nonzero().T}
    close(logits(model, counted, use_cache=False), logits(model, short))


def test_continuous_batching(model, one):
    """Its KV cache holds pieces of many requests: text goes as on the plain model, pictures are refused by name."""
    model = model.float()
    config = copy.deepcopy(model.generation_config)
    config.max_new_tokens, config.do_sample, config.eos_token_id = 3, False, -1

    def say(ids):
        (out,) = model.generate_batch([ids], config, small, warmup=False).values()
        return out.generated_tokens, out.error

    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=1024)
    expected = say([1, 10, 11, 12])
    with attach(model, keep=KEEP):
        assert say([1, 10, 11, 12]) == expected and len(expected[0]) == 3
        assert "PagedAttentionCache" in say(one["input_ids"][0].tolist())[1]
    with pytest.raises(ValueError, match="generate_batch"), attach(model, keep=KEEP):
        model(**one, **{CACHE: object()})


def test_a_cache_of_several_beams_goes_on_with_one_row(model, told):
    inputs = make(ROWS[:1])
    options = {"do_sample": False, "num_beams": 3, "max_new_tokens": 3}
    out = model.generate(**inputs, return_dict_in_generate=True, num_return_sequences=2, **options)
    ids = torch.cat([out.sequences[:1], NEXT[:1]], 1)
    past = getattr(out, CACHE)
    assert len(caches.layout_of(past).index) == 3
    assert model.generate(input_ids=ids, **{CACHE: past}, **options).shape == (1, ids.shape[1] + 3)


def test_a_layout_for_other_rows():
    """Beams repeat every row; anything else would give sizes to the wrong rows."""
    sizes = torch.tensor([[0.0, 1, 2], [3, 4, 5]])
    layout = replace(unchanged(2, 3, torch.device("cpu")), shift=sizes.long(), size=sizes)
    four = layout.repeated(4)
    assert four.size.tolist() == [[0, 1, 2]] * 2 + [[3, 4, 5]] * 2
    assert four.fitted_to(4).size[1].tolist() == [0, 1, 2, 0]
    for rows in (1, 3):  # the sizes of two rows are not those of one
        with pytest.raises(ValueError, match=f"KV cache of 2 rows does not go with {rows} rows"):
            layout.repeated(rows)
    assert torch.equal(four.rows(slice(2)).repeated(1).size, sizes[:1])


def test_caches_are_found_by_either_name():
    past = DynamicCache()
    assert caches.cache_in({"cache": past}) is caches.cache_in({"past_key_values": past, "cache": None}) is past
    assert caches.cache_of((torch.zeros(1), past)) is past and caches.cache_of(torch.zeros(1)) is None


@pytest.mark.parametrize("name", sorted({CACHE, "past_key_values"}))
def test_callers_name_the_cache_as_their_release_does_or_did(model, told, name):
    """The old name works as in the plain model, and only there transformers says that it is old."""
    inputs = make(ROWS[:1])
    past = filled(model, inputs)
    expected = go_on(model, copy.deepcopy(past), inputs["attention_mask"], [0])
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(NEXT[:1])], 1)
    ids = torch.cat([inputs["input_ids"], NEXT[:1]], 1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", FutureWarning)
        out = model(input_ids=NEXT[:1], attention_mask=mask, **{name: copy.deepcopy(past)})
        again = model.generate(input_ids=ids, attention_mask=mask, **{name: past}, max_new_tokens=1, do_sample=False)
    close(out.logits, expected)
    assert again[0, -1] == expected[0, -1].argmax()
    assert len(said) == 2 * (name != CACHE), [str(warning.message) for warning in said]


# ---- ways to call the model ------------------------------------------------------------------------------------------


def test_a_loop_over_tuples(model, told):
    inputs = make(ROWS[:2])
    answers = []
    for options in ({}, {"return_dict": False}):
        mask, ids, past, said = inputs["attention_mask"], inputs["input_ids"], None, []
        more = {"pixel_values": inputs["pixel_values"]}
        for _ in range(4):
            out = model(input_ids=ids, attention_mask=mask, **{CACHE: past}, use_cache=True, **more, **options)
            scores, past = out[:2] if options else (out.logits, getattr(out, CACHE))
            ids, more = scores[:, -1:].argmax(-1), {}
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            said.append(scores[:, -1])
        answers.append(torch.stack(said))
    close(*answers)


def test_the_core_alone_is_merged_as_well(model, handle):
    inputs = make(ROWS)
    out = model.model(**inputs, use_cache=True)
    close(model.lm_head(out.last_hidden_state), logits(model, inputs))
    with handle.using(logits="caller"):
        hidden = model.model(**inputs).last_hidden_state
        assert hidden.shape[:2] == inputs["input_ids"].shape
        close(model.lm_head(hidden), logits(model, inputs))
    expected = go_on(model, filled(model, inputs), inputs["attention_mask"])
    close(go_on(model, getattr(out, CACHE), inputs["attention_mask"]), expected)


def test_the_llm_alone_goes_on_where_the_prompt_ended(model, told):
    past = filled(model, make(ROWS[:1]))
    expected = go_on(model, copy.deepcopy(past), rows=[0])
    embeds = model.get_input_embeddings()(NEXT[:1])
    out = model.model.language_model(inputs_embeds=embeds, **{CACHE: past})
    close(model.lm_head(out.last_hidden_state), expected)


def test_a_prompt_that_is_short_already_goes_on_alike(model, told):
    inputs = make(ROWS[:1])
    image = inputs["input_ids"][0] == IMAGE
    short = {key: inputs[key][:, ~image | (image.cumsum(0) <= KEEP)] for key in ("input_ids", "attention_mask")}
    past = filled(model, {**short, "pixel_values": inputs["pixel_values"]})
    expected = go_on(model, filled(model, inputs), rows=[0])
    close(go_on(model, copy.deepcopy(past), rows=[0]), expected)
    close(go_on(model, past, short["attention_mask"], rows=[0]), expected)


def test_callbacks_continue_caches_of_their_own(model, told):
    """Their calls are no part of the generate() that calls them, nor do they change what it was told."""
    inputs, other = make(ROWS[:1]), make([([1], QUESTION)])
    past = filled(model, other)
    expected, seen = go_on(model, copy.deepcopy(past), other["attention_mask"], [0]), []

    def look(ids, scores):
        seen.append(go_on(model, copy.deepcopy(past), other["attention_mask"], [0]))
        model(**other)
        return scores

    options = {"logits_processor": LogitsProcessorList([look])}
    plain = step_logits(model, inputs)
    close(step_logits(model, inputs, **options), plain)
    close(step_logits(model, inputs, use_cache=False, **options), plain)
    assert len(seen) == 4 and all(torch.equal(one, expected) for one in seen)


def test_an_error_leaves_nothing_behind(model, told):
    inputs = make(ROWS[:1])
    expected = logits(model, inputs)

    def fail(*args):
        raise KeyError("the caller's own")

    hook = model.model.language_model.layers[0].register_forward_pre_hook(fail)
    for called in (model, model.model):
        with pytest.raises(KeyError):
            called(**inputs)
    hook.remove()
    assert torch.equal(model.lm_head(model.model(**inputs).last_hidden_state), expected)
    assert torch.equal(logits(model, inputs), expected)


def test_static_caches_of_llms_with_a_mask_for_each_kind_of_layer():
    family = BY_TITLE["LLaVA-1.5 with Qwen2"]
    model, inputs = family.build(), family.process([(QUESTIONS[0], pictures(0)), (TWO_PICTURES, pictures(1, 2))])
    with attach(model, "pitome", published=True, keep=0.25, **TOLD):
        close(step_logits(model, inputs, cache_implementation="static"), step_logits(model, inputs))
