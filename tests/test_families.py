"""Every family: nothing lost at keep = all, exact counts, generate() as ever, batches, several pictures, turns."""

from __future__ import annotations

import family_table
import pytest
import torch
import transformers
from checks import logits, new_ids
from families import BY_TITLE, FAMILIES, IMAGE, NO_PICTURE, QUESTIONS, TWO_PICTURES, Family, pictures
from models import CACHE
from packed import PACKED
from torch.utils.flop_counter import FlopCounterMode
from transformers import BitsAndBytesConfig

from pitome_mllm import attach, estimate
from pitome_mllm.families import FAMILIES as SPECS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*MatMul8bitLt.*"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # PaliGemma's processor
]
CASES = [
    pytest.param(family, where, id=f"{family.title}-{where}")
    for family in (*FAMILIES, *PACKED)
    for where in family.wheres
    if where in ("both", "packed") or family is FAMILIES[0]  # "both" is the tower and the projector
]
CLASSES = {
    family.model: family for family in reversed((*PACKED, *FAMILIES))
}.values()  # one row of each: LLMs make no difference
BITS = {
    "8 bit": {"load_in_8bit": True},
    "4 bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
}
TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")  # inputs with a column for every token
ROWS = [(QUESTIONS[0], (0,)), (TWO_PICTURES, (1, 2)), (QUESTIONS[1], (3,))]  # texts and their pictures


@pytest.fixture(scope="module")
def made():
    """The inputs of a family's batch, and of its rows alone."""
    cache = {}

    def make(family: Family):
        if family.title not in cache:
            rows = [(text, pictures(*numbers)) for text, numbers in ROWS]
            cache[family.title] = family.process(rows), [family.process([row]) for row in rows]
        return cache[family.title]

    return make


@pytest.mark.parametrize("family,where", CASES)
def test_keeping_all_is_bit_identical(family, where, made):
    model, plain = family.build(), family.build()
    batch, _ = made(family)
    expected, answers = logits(plain, batch), new_ids(plain, batch, 3)
    for method in (None, "pitome"):
        with attach(model, method, keep=1.0, where=where):
            assert torch.equal(logits(model, batch), expected)
            assert new_ids(model, batch, 3) == answers
    assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("family,where", CASES)
def test_a_quarter_is_exact_and_rows_stand_alone(family, where, made):
    """Also with several pictures in a row, and with every row of another length."""
    model, plain = family.build(), family.build()
    batch, alone = made(family)
    with attach(model, "pitome", keep=0.25, where=where) as handle:
        assert handle.plan.keep == round(handle.plan.available / 4)
        together, answers = logits(model, batch), new_ids(model, batch)
        lengths, groups = handle.stats.lengths, handle.stats.groups
        before = 0
        for row, inputs in enumerate(alone):
            seen = logits(model, inputs)
            kept = handle.stats.lengths
            assert kept == lengths[before : before + len(kept)]
            full = family.full(plain, inputs)
            if (expected := family.kept(full, handle.plan.keep)) is not None:
                assert list(kept) == expected
            own = zip(handle.stats.groups, groups[: len(handle.stats.groups)], strict=True)
            assert all(torch.equal(mine, other) for mine, other in own)
            groups = groups[len(handle.stats.groups) :]
            shorter = sum(full) - sum(kept) + family.breaks(inputs)
            assert seen.shape[1] == inputs["input_ids"].shape[1] - shorter > 0
            torch.testing.assert_close(together[row, -seen.shape[1] :], seen[0], atol=1e-4, rtol=1e-4)
            assert new_ids(model, inputs) == [answers[row]]
            before += len(kept)
        assert before == len(lengths) and len(groups) == 0
        assert not family.sized or set(lengths) != {handle.plan.keep}
        assert family.unit.endswith("picture") == (len(lengths) == sum(len(numbers) for _, numbers in ROWS))
    assert torch.equal(logits(model, batch), logits(plain, batch))


@pytest.mark.parametrize("family,where", CASES)
def test_a_row_without_a_picture_is_that_of_the_plain_model(family, where):
    model, plain = family.build(), family.build()
    rows = [(QUESTIONS[0], pictures(1)), (NO_PICTURE, [])]
    batch = family.process(rows)
    text = {key: batch[key][1:] for key in TEXT if key in batch}
    alone = {key: value[:, text["attention_mask"][0] == 1] for key, value in text.items()}
    with attach(model, "pitome", keep=0.25, where=where):
        together, answers = logits(model, batch), new_ids(model, batch, 3)
        for row, inputs in enumerate((family.process(rows[:1]), alone)):
            one = plain if row else model
            seen = logits(one, inputs)[0]
            torch.testing.assert_close(together[row, -len(seen) :], seen, atol=1e-4, rtol=1e-4)
            assert new_ids(one, inputs, 3) == [answers[row]]


@pytest.mark.parametrize("family,where", CASES)
def test_generate_says_what_forward_says(family, where, made):
    """Greedy search by hand, every step from the whole prompt, without a cache."""
    model = family.build()
    _, alone = made(family)
    inputs = {key: value for key, value in alone[1].items() if key != "labels"}
    with attach(model, "pitome", keep=0.25, where=where):
        answer = new_ids(model, inputs, 4)[0]
        longer = dict(inputs)
        for token in answer:
            assert int(logits(model, longer)[0, -1].argmax()) == token
            added = {"input_ids": token, "attention_mask": 1, "token_type_ids": family.answers, "mm_token_type_ids": 0}
            for key in added.keys() & longer.keys():
                longer[key] = torch.cat([longer[key], torch.full((1, 1), added[key])], 1)


@pytest.mark.parametrize("family,where", CASES)
def test_turns_continue_the_cache(family, where, made):
    """A second question on the cache of the first answer: the same as the whole conversation anew."""
    model = family.build()
    _, alone = made(family)
    inputs = {key: value for key, value in alone[1].items() if key != "labels"}
    with attach(model, "pitome", keep=0.25, where=where):
        first = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        question = torch.tensor([[7, 8, 9, 10]])
        ids = torch.cat([first.sequences, question], 1)
        more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for key, value in {"token_type_ids": family.answers, "mm_token_type_ids": 0}.items():
            if key in inputs:
                added = torch.full_like(ids[:, inputs["input_ids"].shape[1] :], value)
                more[key] = torch.cat([inputs[key], added], 1)
        second = model.generate(**more, **{CACHE: first[CACHE]}, max_new_tokens=4, do_sample=False)
        assert torch.equal(second[:, : ids.shape[1]], ids)
        anew = new_ids(model, {**inputs, **more}, 4)
        assert second[:, ids.shape[1] :].tolist() == anew


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a family's model was saved."""
    saved = {}

    def save(family: Family):
        if family.title not in saved:
            saved[family.title] = tmp_path_factory.mktemp("checkpoint")
            family.build().save_pretrained(saved[family.title])
        return saved[family.title]

    return save


@pytest.mark.parametrize(
    "family,bits",
    [(family, bits) for family in CLASSES for bits in BITS if bits in family.bits or family.bits == "yes"],
    ids=lambda value: getattr(value, "title", value),
)
def test_quantised(family, bits, made, folder):
    """In and behind the tower: counts are exact, nothing is lost at keep = all, and generate() is that of forward()."""
    whole = ["lm_head", "shared_expert_gate"]  # of the latter, one number wide, 4 bits on a processor take none
    options = {"quantization_config": BitsAndBytesConfig(**BITS[bits], llm_int8_skip_modules=whole)}
    options["device_map"] = {"": "cpu"}
    model = family.cls.from_pretrained(folder(family), dtype=torch.float32, **options).eval()
    batch, _ = made(family)
    plain = logits(model, batch)
    assert any("bit" in type(module).__name__ for module in model.modules())
    for where in dict.fromkeys((family.wheres[0], family.wheres[-1])):
        with attach(model, "pitome", keep=1.0, where=where) as handle:
            assert torch.equal(logits(model, batch), plain)
            handle.update(keep=0.25)
            seen = logits(model, batch)
            assert seen.isfinite().all() and seen.shape[1] < plain.shape[1]
            assert handle.plan.keep == round(handle.plan.available / 4)
            assert [row[0] for row in new_ids(model, batch, 2)] == seen[:, -1].argmax(-1).tolist()
    assert torch.equal(logits(model, batch), plain)


@pytest.mark.parametrize("name", family_table.TABLES)
def test_docs_have_these_rows(name):
    page, written = family_table.with_table(name)
    assert written == page, "run: python tests/family_table.py"


def test_every_row_of_the_package_is_tested():
    assert set(SPECS) <= {family.model for family in (*FAMILIES, *PACKED)}
    for family in FAMILIES:
        if family.model in SPECS:
            assert family.wheres == SPECS[family.model].places


@pytest.mark.parametrize("title", ["VipLLaVA", "PaliGemma", "Idefics3"])
def test_the_estimate_counts_what_runs(title):
    """FLOPs counted while forward() runs, where the projector is not LLaVA's."""
    family = BY_TITLE[title]
    model, inputs = family.build(), family.process([(QUESTIONS[0], pictures(0))])
    model.set_attn_implementation("eager")  # the counter does not see into other kernels
    inputs.pop("labels", None)
    where = family.wheres[-1]
    with attach(model, "pitome", keep=0.25, where=where) as handle:
        with FlopCounterMode(display=False) as counter:
            logits(model, inputs, logits_to_keep=1)
        text, tiles = int((inputs["input_ids"] != IMAGE).sum()), handle.stats.images
        own = estimate(model, "pitome", keep=0.25, where=where, images=tiles, text_tokens=text)
    assert own.visual_tokens == handle.plan.keep
    assert own.flops == pytest.approx(
        counter.get_total_flops(), rel=1e-4
    )  # transformers 5.17 runs 0.002 % more than 5.23


class Renamed(transformers.LlavaForConditionalGeneration):
    """A LLaVA that is none by name."""


def test_a_subclass_of_a_family_is_of_it():
    made = Renamed(BY_TITLE["LLaVA-1.5"].config()).eval()
    with attach(made, "pitome", keep=36) as handle:
        assert handle.family is SPECS["LlavaForConditionalGeneration"]


@pytest.mark.parametrize("kind", ["DeepseekVLModel", "FuyuForCausalLM"])
def test_a_model_without_a_row_is_refused_with_how_to_add_one(kind):
    part = BY_TITLE["DeepSeek-VL"].build().model
    model = type(kind, (torch.nn.Module,), {})() if kind != type(part).__name__ else part
    with pytest.raises(ValueError) as error:
        attach(model, keep=4)
    for word in (f"unsupported model {kind}", "LlavaForConditionalGeneration", "a row in pitome_mllm.families"):
        assert word in str(error.value)
    assert not any("_pitome" in vars(module) or module._forward_pre_hooks for module in model.modules())


def test_a_checkpoint_without_a_vision_tower_is_refused():
    """Gemma 4 has some for text alone, of the same class."""
    config = next(family for family in PACKED if family.title == "Gemma 4").config()
    config.vision_config = None
    with pytest.raises(ValueError, match="this 'gemma4' has no vision tower"):
        attach(transformers.Gemma4ForConditionalGeneration(config), keep=4)
