"""TRL's trainers around a model that merges: what they report is what one finds by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from models import IMAGE, QUESTION, build, picture, processor
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from pitome_mllm import attach

MERGED, CALLER = {"keep": 144}, {"keep": 144, "logits": "caller"}
COMPLETIONS = ["red star", "red star red yellow"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
LORA = {"r": 2, "target_modules": r".*language_model.*\.[qv]_proj", "init_lora_weights": False, "lora_dropout": 0.0}


def arguments(kind, folder, **options):
    common = dict(max_steps=1, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], logging_steps=1)
    common |= dict(save_strategy="no", disable_tqdm=True, per_device_train_batch_size=2, remove_unused_columns=False)
    return kind(output_dir=str(folder), **{**common, **options})


def rows(**columns):
    return Dataset.from_dict({"images": [[picture(0)], [picture(1)]], **columns})


def first_log(trainer):
    """What the trainer says of its first step."""
    trainer.train()
    log = trainer.state.log_history[0]
    assert all(value == value and abs(value) < 1e6 for value in log.values()), "not finite"
    assert log["grad_norm"] > 0
    return log


def completion_scores(model, number, prompt, completion):
    """Log-probabilities of the tokens of a completion, of one row without padding."""
    given = dict(images=[picture(number)], text=[f"{prompt} {completion}"], return_tensors="pt")
    x = processor()(**given, add_special_tokens=False)  # as TRL does
    count = len(completion.split())
    with torch.no_grad():
        out = model(**x).logits[:, -count - 1 : -1].log_softmax(-1)
    return out.gather(2, x["input_ids"][:, -count:, None])[0, :, 0]


@pytest.mark.parametrize("settings", [MERGED, CALLER], ids=str)
def test_sft_on_prompts_and_completions(tmp_path, settings):
    model = build()
    with attach(model, **settings) as handle:
        scores = [completion_scores(model, n, QUESTION, text) for n, text in enumerate(COMPLETIONS)]
        trainer = SFTTrainer(
            model,
            arguments(SFTConfig, tmp_path, max_length=None),
            train_dataset=rows(prompt=[QUESTION] * 2, completion=COMPLETIONS),
            processing_class=processor(),
        )
        assert first_log(trainer)["loss"] == pytest.approx(-float(torch.cat(scores).mean()), abs=1e-4)
        assert handle.stats.tokens_after == 144


def test_sft_on_whole_texts_counts_every_label_once(tmp_path):
    """TRL labels placeholders too, and divides by all labels of the caller: those that went count as their tokens."""
    model, gone = build(), 576 - 144
    texts = [f"{QUESTION} {completion}" for completion in COMPLETIONS]
    given = dict(images=[picture(0), picture(1)], text=texts, padding=True, padding_side="right", return_tensors="pt")
    x = processor()(**given, add_special_tokens=False)
    with attach(model, **MERGED) as handle:
        with torch.no_grad():
            logits = model(**x).logits
        layout = handle.stats.layout
        ids = x["input_ids"].gather(1, layout.clamp(min=0))[:, 1:]
        real = (layout >= 0)[:, 1:] & (x["attention_mask"].gather(1, layout.clamp(min=0))[:, 1:] == 1)
        last = (ids == IMAGE) & (ids.roll(-1, 1) != IMAGE)  # the placeholder whose score those that went repeat
        scores = logits[:, :-1].log_softmax(-1).gather(2, ids[..., None])[..., 0]
        expected = -(scores * (1 + gone * last))[real].sum() / (x["attention_mask"][:, 1:].sum())
        handle.update(logits="caller")
        trainer = SFTTrainer(
            model,
            arguments(SFTConfig, tmp_path, max_length=None),
            train_dataset=rows(text=texts),
            processing_class=processor(),
        )
        assert first_log(trainer)["loss"] == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_dpo(tmp_path, lora):
    """Rewards start at zero; log-probabilities are those of each row alone."""
    model, reference = build(), build()
    attach(model, **CALLER)
    attach(reference, **CALLER)
    chosen = [completion_scores(model, n, QUESTION, text).sum() for n, text in enumerate(COMPLETIONS)]
    rejected = [completion_scores(model, n, QUESTION, "blue").sum() for n in range(2)]
    config = LoraConfig(**{**LORA, "init_lora_weights": True}) if lora else None
    trainer = DPOTrainer(
        model,
        None if lora else reference,
        arguments(DPOConfig, tmp_path, max_length=None),
        train_dataset=rows(prompt=[QUESTION] * 2, chosen=COMPLETIONS, rejected=["blue"] * 2),
        processing_class=processor(),
        peft_config=config,
    )
    log = first_log(trainer)
    assert log["loss"] == pytest.approx(float(-F.logsigmoid(torch.tensor(0.0))), abs=1e-4)
    assert log["logps/chosen"] == pytest.approx(float(sum(chosen)) / 2, abs=1e-3)
    assert log["logps/rejected"] == pytest.approx(float(sum(rejected)) / 2, abs=1e-3)


@pytest.mark.parametrize("settings", [MERGED, CALLER], ids=str)
@pytest.mark.parametrize("lora", [False, True])
def test_grpo(tmp_path, settings, lora):
    """Prompts of unequal length, padded left, with completions behind them: scored as rows alone."""
    model, given = build(), processor()
    given.chat_template = given.tokenizer.chat_template = TEMPLATE
    attach(model, **settings)
    prompts = ["what", "what colour is the star"]
    trainer = GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(n) for n in range(len(completions))],
        args=arguments(
            GRPOConfig,
            tmp_path,
            num_generations=2,
            max_completion_length=5,
            per_device_train_batch_size=4,
            beta=0.1 if lora else 0.0,
        ),
        train_dataset=rows(prompt=[[{"role": "user", "content": text}] for text in prompts]),
        processing_class=given,
        peft_config=LoraConfig(**LORA) if lora else None,
    )
    score, seen = trainer._get_per_token_logps_and_entropies, []

    def compared(scored, ids, mask, keep, *args, **kwargs):
        out = score(scored, ids, mask, keep, *args, **kwargs)
        for row, real in enumerate(mask == 1):
            alone = {"input_ids": ids[row : row + 1, real], "attention_mask": mask[row : row + 1, real]}
            answer = int(mask[row, -keep:].sum())
            with torch.no_grad():
                told = scored(**alone, pixel_values=kwargs["pixel_values"][row : row + 1]).logits[:, -answer - 1 : -1]
            expected = told.log_softmax(-1).gather(2, alone["input_ids"][:, -answer:, None])[0, :, 0]
            torch.testing.assert_close(out[0][row, :answer].detach().double(), expected.double(), atol=1e-3, rtol=0)
        seen.append(mask)
        return out

    trainer._get_per_token_logps_and_entropies = compared
    trainer.train()
    assert seen and all(len({*mask.sum(1).tolist()}) > 1 for mask in seen), "no row is padded"
    assert trainer.state.log_history[0]["grad_norm"] > 0
