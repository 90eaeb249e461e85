"""Training and scoring loops around an attached model: what they slice, count and compare is the caller's prompt."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks import TOLERANCE, logits
from families import BY_TITLE, QUESTIONS, pictures
from models import BOS, CACHE, IMAGE, PAD, QUESTION, build, picture, processor, since_518
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import LogitsProcessorList, Trainer, TrainingArguments

from pitome_mllm import attach
from pitome_mllm.hooks.layout import shorten

IGNORE, KEEP = -100, 144
DEFAULT, COMPACT = {"keep": KEEP}, {"keep": KEEP, "calibration": "none"}
LONG = QUESTION + " red star" * 12


@pytest.fixture
def model():
    return build()


def prompts(*texts, side="left"):
    """One picture for every text."""
    return processor(padding_side=side)(
        images=[picture(n) for n in range(len(texts))], text=list(texts), padding=True, return_tensors="pt"
    )


def labelled(inputs, placeholders=False):
    """``inputs`` with labels at every token; not at placeholders, unless asked for."""
    ids = inputs["input_ids"]
    hidden = (inputs["attention_mask"] == 0) | (ids == BOS) | ((ids == IMAGE) & (not placeholders))
    return {**inputs, "labels": ids.masked_fill(hidden, IGNORE)}


def alone(inputs, row):
    """One row without its padding."""
    real = inputs["attention_mask"][row] == 1
    return {
        "input_ids": inputs["input_ids"][row : row + 1, real],
        "attention_mask": torch.ones(1, int(real.sum()), dtype=torch.long),
        "pixel_values": inputs["pixel_values"][row : row + 1],
    }


# ---- padding ---------------------------------------------------------------------------------------------------------


def completed(inputs, answers):
    """Prompts padded left with ``answers`` behind them, padded right: what RL trainers score."""
    width = max(map(len, answers))
    ids = torch.tensor([[*answer, *[PAD] * (width - len(answer))] for answer in answers])
    return {
        "input_ids": torch.cat([inputs["input_ids"], ids], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], (ids != PAD).long()], 1),
        "pixel_values": inputs["pixel_values"],
    }


def scores(model, inputs, width):
    """Log-probabilities (B, width) of the last columns of the prompt, sliced off its end."""
    out = logits(model, inputs, logits_to_keep=width + 1)[:, -width - 1 : -1]
    return out.log_softmax(-1).gather(2, inputs["input_ids"][:, -width:, None])[..., 0]


@pytest.mark.parametrize("settings", [DEFAULT, COMPACT, {**DEFAULT, "logits": "caller"}], ids=str)
def test_completions_padded_right_behind_prompts_padded_left(model, settings):
    answers = [[7, 8, 9], [7, 8, 9, 10, 11]]
    batch = completed(prompts("USER: <image> what ASSISTANT:", QUESTION), answers)
    with attach(model, **settings) as handle:
        together, groups = scores(model, batch, 5), handle.stats.groups
        for row, answer in enumerate(answers):
            seen = scores(model, alone(batch, row), len(answer))[0]
            assert torch.equal(handle.stats.groups[0], groups[row])
            torch.testing.assert_close(together[row, : len(answer)], seen, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "rows",
    [  # I: pictures of 4 tokens, of which 1 stays; t: text; _: padding
        ("___tIIIItt", "tttIIIIttt"),
        ("ttIIIItt__", "__ttIIIItt"),
        ("tIIIIttt__", "tIIIItt___"),
        ("IIIItIIIIt", "IIIIttt___"),
        ("IIIIt_t___", "tttIIIItt_"),
        ("tttttttttt", "____IIIItt"),
    ],
)
def test_the_last_columns_stay_the_last(rows):
    """Those behind the last picture of all rows, whatever padding and pictures each row has."""
    image = torch.tensor([[c == "I" for c in row] for row in rows])
    real = torch.tensor([[c != "_" for c in row] for row in rows])
    count = int(image.sum()) // 4
    layout = shorten(image, real.long(), [4] * count, [1] * count)
    tail = min(len(row) - 1 - row.rfind("I") for row in rows)
    width = image.shape[1]
    assert tail and torch.equal(layout.index[:, -tail:], torch.arange(width - tail, width).expand(len(rows), -1))
    kept = real & (~image | (image.flatten().cumsum(0).view_as(image) % 4 == 1))
    for columns, stays in zip(layout.columns, kept, strict=True):
        assert columns[columns >= 0].tolist() == stays.nonzero()[:, 0].tolist()


# ---- labels and losses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [576, 144, 36])
@pytest.mark.parametrize("shifted", [False, True])
def test_the_loss_is_a_mean_over_the_labels_that_are_there(model, keep, shifted):
    """A trainer counts the labels of the caller's prompt, those of placeholders that go among them."""
    inputs = labelled(prompts(QUESTION + " red star"), placeholders=True)
    count = (inputs["labels"][:, 1:] != IGNORE).sum()
    with attach(model, "pitome", published=True, keep=keep):
        expected = model(**inputs).loss
        if shifted:
            inputs["shift_labels"] = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE)
        for number in (count, int(count)):
            seen = model(**inputs, num_items_in_batch=number).loss
            torch.testing.assert_close(seen, expected, atol=1e-5, rtol=0)
        part = model(**inputs, num_items_in_batch=4 * count).loss  # one of four calls of a step
        torch.testing.assert_close(part, expected / 4, atol=1e-5, rtol=0)


def test_a_call_without_labels_left_has_no_loss(model):
    inputs = prompts(QUESTION)
    labels = torch.full_like(inputs["input_ids"], IGNORE)
    labels[0, (inputs["input_ids"][0] == IMAGE).nonzero()[-1]] = IMAGE  # a placeholder that goes
    with attach(model, **COMPACT):
        assert model(**inputs, labels=labels, num_items_in_batch=7).loss.item() == 0


@pytest.mark.parametrize("wanted", ["tensor", "negative", "bool", "last"])
def test_logits_to_keep_names_columns_of_the_caller(model, wanted):
    inputs = prompts(LONG + " red" * 600, QUESTION)
    width = inputs["input_ids"].shape[1]
    columns = torch.tensor([width - 1, width - 7, width - 2]) if wanted != "last" else torch.tensor([width - 1])
    asked = columns - width if wanted == "negative" else columns
    if wanted == "bool":
        asked = torch.zeros(width, dtype=torch.bool).index_fill(0, columns, True)
        columns = columns.sort().values
    with attach(model, **COMPACT):
        whole = logits(model, inputs)
        expected = whole[:, columns - width + whole.shape[1]]
        torch.testing.assert_close(logits(model, inputs, logits_to_keep=asked), expected, atol=1e-5, rtol=0)


# ---- logits at the caller's columns ----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("settings", [DEFAULT, COMPACT], ids=str)
def test_logits_at_the_columns_of_the_caller(model, side, settings):
    """By `stats.layout` they are those of the shorter prompt, and every text token is predicted as there."""
    inputs = labelled(prompts(LONG, QUESTION, side=side))
    with attach(model, **settings) as handle, torch.no_grad():
        merged, layout = model(**inputs), handle.stats.layout
        assert layout.shape == merged.logits.shape[:2]
        handle.update(logits="caller")
        caller = model(**inputs)
        assert caller.logits.shape[:2] == inputs["input_ids"].shape
        torch.testing.assert_close(caller.loss, merged.loss)
        loss = F.cross_entropy(caller.logits[:, :-1].flatten(0, 1).float(), inputs["labels"][:, 1:].flatten())
        torch.testing.assert_close(loss, merged.loss)
        for row, columns in enumerate(layout):
            real = columns >= 0
            assert torch.equal(caller.logits[row, columns[real]], merged.logits[row, real])
        pair = model(**inputs, return_dict=False)
        assert torch.equal(pair[1], caller.logits)
        for keep in (3, 40, torch.tensor([5, 700 % inputs["input_ids"].shape[1]])):
            columns = slice(-keep, None) if isinstance(keep, int) else keep
            seen = logits(model, {k: v for k, v in inputs.items() if k != "labels"}, logits_to_keep=keep)
            torch.testing.assert_close(seen, caller.logits[:, columns], atol=1e-5, rtol=0)


def test_a_second_turn_at_the_columns_of_the_caller(model):
    """The cache holds the first; the picture of the second goes as the first one's went."""
    first, second = prompts(QUESTION), prompts("red star " + QUESTION)
    both = {
        "input_ids": torch.cat([first["input_ids"], second["input_ids"]], 1),
        "pixel_values": torch.cat([first["pixel_values"], second["pixel_values"]]),
    }
    with attach(model, **DEFAULT, logits="caller") as handle:
        whole, layout = logits(model, both), handle.stats.layout
        cache = model(**first, use_cache=True)[CACHE]
        ids = second["input_ids"]
        seen = logits(model, {"input_ids": ids, "pixel_values": second["pixel_values"]}, **{CACHE: cache})
        assert seen.shape[1] == ids.shape[1] and torch.equal(handle.stats.layout, layout)
        torch.testing.assert_close(seen, whole[:, -ids.shape[1] :], atol=TOLERANCE, rtol=0)


def test_what_a_model_says_of_every_label_comes_to_the_callers_columns(model):
    """Trainers give models a head that returns log-probabilities (B, S - 1) in place of logits, 0 without a label."""
    own = model.forward

    def fused(labels=None, **kwargs):
        out = own(**kwargs)
        following = labels[:, 1:]
        told = out.logits[:, :-1].log_softmax(-1).gather(2, following.clamp(min=0)[..., None])[..., 0]
        out["log_probs"] = told.masked_fill(following == IGNORE, 0)
        out["label_mask"] = following != IGNORE
        return out

    inputs = labelled(prompts(LONG, QUESTION))
    model.forward = fused
    with attach(model, **DEFAULT, logits="caller"), torch.no_grad():
        out = model(**inputs)
    following = inputs["labels"][:, 1:]
    expected = out.logits[:, :-1].log_softmax(-1).gather(2, following.clamp(min=0)[..., None])[..., 0]
    assert out["label_mask"].dtype == torch.bool and torch.equal(out["label_mask"], following != IGNORE)
    torch.testing.assert_close(out["log_probs"], expected.masked_fill(following == IGNORE, 0))


def collate(texts):
    return labelled(prompts(*texts, side="right"))


def trainer(model, folder, **options):
    settings = dict(max_steps=2, use_cpu=True, report_to=[], remove_unused_columns=False, save_strategy="no")
    settings |= dict(disable_tqdm=True, per_device_eval_batch_size=2, logging_steps=1)
    metrics = options.pop("compute_metrics", None)
    arguments = TrainingArguments(folder, **{**settings, **options})
    rows = [LONG, QUESTION]
    model.config.keys_to_ignore_at_inference = [CACHE, "image_outputs"]  # those that transformers 5.24 brings, too
    return Trainer(
        model, arguments, data_collator=collate, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics
    )


def test_label_smoothing_and_metrics_of_trainers(model, tmp_path):
    seen = []

    def metrics(prediction):
        said = prediction.predictions  # alone, or with what else the model returned
        said = said[0] if isinstance(said, tuple) else said
        guess, truth = said.argmax(-1)[:, :-1], prediction.label_ids[:, 1:]
        seen.append((guess == truth)[truth != IGNORE])
        return {"right": float(seen[-1].mean())}

    inputs = collate([LONG, QUESTION])
    with attach(model, **DEFAULT, logits="caller") as handle:
        model.eval()
        out = trainer(model, tmp_path, compute_metrics=metrics).evaluate()
        handle.update(logits="merged")
        with torch.no_grad():
            expected, layout = model(**inputs), handle.stats.layout
        assert out["eval_loss"] == pytest.approx(float(expected.loss), abs=1e-5)
        labels = inputs["labels"].gather(1, layout.clamp(min=0)).masked_fill(layout < 0, IGNORE)
        right = expected.logits[:, :-1].argmax(-1) == labels[:, 1:]
        assert np.array_equal(seen[0], right[labels[:, 1:] != IGNORE].numpy())
        log_probs = expected.logits.log_softmax(-1)[labels != IGNORE]  # the trainer shifts no labels of this class
        by_hand = -0.9 * log_probs.gather(1, labels[labels != IGNORE][:, None]).mean() - 0.1 * log_probs.mean()
        handle.update(logits="caller")
        smoothed = trainer(model, tmp_path, label_smoothing_factor=0.1, max_steps=1, per_device_train_batch_size=2)
        assert smoothed.train().training_loss == pytest.approx(float(by_hand), abs=1e-4)


# ---- what else a program may set or bring ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("title", ["LLaVA-1.5", "LLaVA-NeXT (1.6)", "LLaVA-OneVision"])
@pytest.mark.parametrize("method", ["pitome", "visionzip"])
def test_another_default_dtype_changes_nothing(title, dtype, method):
    family = BY_TITLE[title]
    model, inputs = family.build(), family.process([(QUESTIONS[0], pictures(0))])
    if method == "visionzip" and title == "LLaVA-OneVision":
        method = "tome"  # SigLIP has no class token
    found = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            with attach(model, method, keep=0.25):
                found.append(logits(model, inputs))
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*found)


@since_518
@pytest.mark.parametrize("title", ["LLaVA-1.5", "LLaVA-NeXT (1.6)", "Idefics3"])
@pytest.mark.parametrize("asks", [{"keep": 0.25}, None], ids=str)
@pytest.mark.parametrize("drafts", [{"keep": 0.25}, {"keep": 0.5}], ids=str)
def test_a_draft_model_changes_no_answer(title, asks, drafts):
    family = BY_TITLE[title]
    model, inputs = family.build(), family.process([(QUESTIONS[0], pictures(0))])
    draft = copy.deepcopy(model)
    if asks:
        attach(model, **asks)
    with attach(draft, **drafts):
        options = {"max_new_tokens": 6, "do_sample": False}
        expected = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, assistant_model=draft, **options), expected)


@since_518
def test_features_that_a_model_lends_while_it_generates(model):
    """Another one that gets them knows how they merged: a copy finds the same."""
    inputs, draft, found = prompts(QUESTION), copy.deepcopy(model), []
    with attach(model, **DEFAULT), attach(draft, **DEFAULT):
        with torch.no_grad():
            features = model.get_image_features(inputs["pixel_values"], return_dict=True)
        image = inputs["input_ids"] == IMAGE
        ids = inputs["input_ids"][~image | (image.cumsum(1) <= KEEP)][None]

        def ask(seen, scores):
            found.append(
                (logits(draft, {"input_ids": ids}, mm_encoder_outputs={"image": features})[:, -1].float(), scores)
            )
            return scores

        model.generate(**inputs, max_new_tokens=1, do_sample=False, logits_processor=LogitsProcessorList([ask]))
        torch.testing.assert_close(*found[0], atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match="mm_encoder_outputs"):
            logits(draft, {"input_ids": ids}, mm_encoder_outputs={"image": features})


# ---- peft ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default::FutureWarning")  # peft passes the cache by its old name
@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig])
def test_prompt_learning(model, kind):
    """Virtual tokens in front of the prompt learn: the loss falls, and is that of the shorter prompt with them."""
    inputs = labelled(prompts(LONG))
    wrapped = get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with attach(wrapped, **COMPACT) as handle:
        losses = descend(wrapped, inputs)
        assert losses[-1] < losses[0] and handle.stats.tokens_after == KEEP


@pytest.mark.skipif(CACHE == "cache", reason="peft 0.21 looks for the cache's old name: the plain model disagrees, too")
@pytest.mark.parametrize("settings", [DEFAULT, COMPACT], ids=str)
@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig])
def test_prompt_learning_generates(model, kind, settings):
    """As forward says, token by token, in padded rows too; with prompt tuning padding follows virtual tokens."""
    bare = kind is PrefixTuningConfig and settings is COMPACT  # plain rows count padding there, but in generate()
    inputs = prompts(QUESTION, QUESTION if bare else LONG)
    torch.manual_seed(0)
    wrapped = get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=4)).double()
    options = dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)
    with attach(wrapped, **settings), torch.no_grad():
        out = wrapped.generate(**inputs, **options)
        mask = F.pad(inputs["attention_mask"], (0, 3), value=1)
        seen = wrapped(input_ids=out.sequences, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits
        expected = torch.stack(out.logits, 1)
        torch.testing.assert_close(seen[:, -4:-1], expected, atol=TOLERANCE, rtol=0, check_dtype=False)


def descend(wrapped, inputs, steps=4):
    """The losses of a few steps."""
    learning = [w for w in wrapped.parameters() if w.requires_grad]
    optimiser, losses = torch.optim.AdamW(learning, lr=3e-2), []
    for _ in range(steps):
        loss = wrapped(**inputs).loss
        loss.backward()
        assert any(w.grad is not None and w.grad.any() for w in learning)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def test_adapters_switched_and_merged(model):
    """Each one is as on a model that carries it alone; folded into the weights it is the same."""
    inputs = prompts(QUESTION)
    lora = dict(r=4, target_modules=r".*language_model.*\.[qv]_proj", init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, LoraConfig(**lora), adapter_name="one")
    wrapped.add_adapter("two", LoraConfig(**lora))
    with attach(wrapped, **DEFAULT):
        seen = {}
        for name in ("one", "two", "one"):
            wrapped.set_adapter(name)
            found = logits(wrapped, inputs)
            assert torch.equal(seen.setdefault(name, found), found)
        assert not torch.allclose(seen["one"], seen["two"], atol=1e-3)
        wrapped.merge_adapter()
        torch.testing.assert_close(logits(wrapped, inputs), seen["one"], atol=TOLERANCE, rtol=0)
        wrapped.unmerge_adapter()
        torch.testing.assert_close(logits(wrapped, inputs), seen["one"], atol=TOLERANCE, rtol=0)
