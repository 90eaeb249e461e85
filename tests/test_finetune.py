"""Fine-tuning with merging on: what it learns from is what `score` asks, and its results are told as they are."""

from __future__ import annotations

import torch

from pitome_mllm import attach, load
from pitome_mllm_eval import report
from pitome_mllm_eval.documents import read, write_csv
from pitome_mllm_eval.training import finetune
from pitome_mllm_eval.training.tiny_batch import IGNORE, training_batch
from pitome_mllm_eval.training.tiny_model import EOS


def test_training_rows_are_prompts_with_labels_at_the_answers():
    """The prompt of a row is what the processor makes of its text, and every label names the token it stands at."""
    _, processor = load("tiny")
    batch = training_batch(0, 0, finetune.PHASE, 0)
    made = finetune.inputs(batch, image=4, tokens=576)
    ids, labels = made["input_ids"][0], made["labels"][0]
    real = ids[made["attention_mask"][0] == 1]
    first = real[: (real == EOS).nonzero()[0, 0] + 1]
    text = processor.tokenizer.decode(first[2 + 576 :])
    question, answer = text.split(" assistant: ")
    prompt = f"USER: <image> {question} ASSISTANT: {answer}"
    assert torch.equal(torch.tensor(processor.tokenizer(prompt).input_ids)[3:], first[2 + 576 :])
    known = labels != IGNORE
    assert torch.equal(labels[known], ids[known]) and int(known.sum()) >= finetune.PHASE.rows
    assert made["pixel_values"].shape == (finetune.PHASE.pictures, 3, 192, 192)
    assert -1 <= made["pixel_values"].min() < made["pixel_values"].max() <= 1


def test_adapters_learn_and_nothing_else():
    model, _ = load("tiny")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with attach(model, "pitome", published=True, keep=72):
        tuned = finetune.tune(model, steps=2, rank=2)
    changed = {name for name, weight in tuned.named_parameters() if weight.requires_grad}
    assert changed and all("lora_" in name for name in changed)
    assert any(weight.any() for name, weight in tuned.named_parameters() if "lora_B" in name)
    after = {name.replace(".base_layer", ""): w for name, w in model.named_parameters() if "lora_" not in name}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def rows(tmp_path, **changes):
    about = {"split": "test", "device": "a processor", "torch": "t", "transformers": "f", "weights": "w", "date": "d"}
    common = dict(method="pitome", where="tower", keep=72, steps=9, rank=4, rate=1e-3, seed=0, seconds=12.0)
    figures = {"before": (0.5, 0.4, 0.6), "after": (0.75, 0.7, 0.8), "difference": (0.25, 0.2, 0.3)}
    made = [
        common | changes | {"what": what, "questions": 80, "value": v, "low": low, "high": high}
        for what, (v, low, high) in figures.items()
    ]
    write_csv(tmp_path / "found.csv", made, about)
    return tmp_path / "found.csv"


def test_the_report_says_what_the_csv_holds(tmp_path):
    text = report.finetuned(rows(tmp_path))
    assert "accuracy (%) 50.0 (40.0 to 60.0) before, 75.0 (70.0 to 80.0) after 9 steps" in text
    assert "+25.0 (+20.0 to +30.0) points" in text


def test_the_recorded_gain_is_beyond_chance():
    rows = {row["what"]: row for row in read(finetune.RESULTS, "measure")}
    assert rows["difference"]["split"] == "test" and rows["difference"]["questions"] == "3360"
    assert int(rows["difference"]["keep"]) == 72 and float(rows["difference"]["low"]) > 0
