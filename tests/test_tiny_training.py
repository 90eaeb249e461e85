"""The training recipe of the embedded model: exact batches, exact resuming, and the ordinary model's sums."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import pitome_mllm
from pitome_mllm.loading import TINY
from pitome_mllm_eval.benchmark.scenes import GRID, PATCH
from pitome_mllm_eval.benchmark.score import predict, prompts, score
from pitome_mllm_eval.benchmark.sets import blind_answer, scene, scene_questions
from pitome_mllm_eval.training import export_tiny, tiny_batch, tiny_forward, train_tiny
from pitome_mllm_eval.training.tiny_batch import (
    IGNORE,
    Phase,
    encode_scene,
    patch_ids,
    row_length,
    stack,
    training_batch,
)
from pitome_mllm_eval.training.tiny_forward import Heads, answer_loss, language_states, losses, tower_features
from pitome_mllm_eval.training.tiny_model import build_model, word_ids
from pitome_mllm_eval.training.train_tiny import Trainer

PHASES = (
    Phase("see", 1, 2, 0, side=96, ask=False, chat_share=0.0),
    Phase("ask-small", 2, 2, 4, side=96, chat_share=0.5),
    Phase("ask-full", 1, 1, 2),
)

PROMPT = "USER: <image>\n{} ASSISTANT:"


INPUTS = ("pixels", "patches", "tokens")  # the only parts of a batch that the model itself is given


@pytest.fixture(scope="module")
def model():
    """An untrained model with sharper answers than its small initial weights give."""
    model = build_model(3).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def tiny():
    return pitome_mllm.load("tiny")


@pytest.fixture(scope="module")
def processor(tiny):
    return tiny[1]


@pytest.fixture(scope="module")
def command():
    """The command line with short phases, evaluating on one picture after every step with questions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tiny, "PHASES", PHASES)
        options = "--threads 1 --every 1 --validation 16".split()
        yield lambda out, *more: train_tiny.main(["--out", str(out), *options, *more])


def answers(model, processor, picture, texts):
    """First word of the answer to each question on one picture."""
    asked = prompts(processor, model.config.image_token_id, model.config.image_seq_length, picture, texts)
    return processor.tokenizer.convert_ids_to_tokens(predict(model, [asked]))


def outcome(out: Path) -> tuple[dict, list[dict]]:
    """Weights of the last checkpoint, and rows of the log without the time."""
    with (out / "log.csv").open(newline="") as file:
        rows = [{name: value for name, value in row.items() if name != "time"} for row in csv.DictReader(file)]
    return torch.load(out / "checkpoint.pt")["parts"], rows


@pytest.fixture(scope="module")
def straight(command, tmp_path_factory):
    """Folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("straight")
    command(out)
    return out


@pytest.mark.parametrize("name, call", [("advance", 3), ("save", 2), ("evaluate", 3)])
def test_an_interrupted_command_resumes_exactly(name, call, command, straight, tmp_path):
    """Wherever it stops."""
    real, calls = getattr(Trainer, name), []

    def stopped(*args):
        calls.append(name)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, name, stopped)
        command(tmp_path)
    command(tmp_path, "--resume")
    (expected, rows), (got, resumed) = outcome(straight), outcome(tmp_path)
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert resumed == rows
    assert [row["step"] for row in rows if row["split"] == "train"] == ["1", "2", "3", "4"]
    assert [row["step"] for row in rows if row["split"] == "validation"] == ["2", "3", "4"]
    assert [row["pictures"] for row in rows] == ["2", "4", "4", "6", "6", "7", "7"]


def test_a_run_is_neither_overwritten_nor_resumed_from_nothing(command, straight, tmp_path, capsys):
    before = (straight / "checkpoint.pt").read_bytes(), (straight / "log.csv").read_bytes()
    for out, options, message in (
        (straight, (), "add --resume to continue it"),
        (tmp_path, ("--resume",), "nothing to resume"),
    ):
        with pytest.raises(SystemExit) as stop:
            command(out, *options)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert before == ((straight / "checkpoint.pt").read_bytes(), (straight / "log.csv").read_bytes())
    assert not list(tmp_path.iterdir())


def test_a_step_learns():
    """Of one batch, which is the first of its phase again and again."""
    trainer, found = Trainer((Phase("see", 8, 4, 0, side=96, ask=False, warmup=1),)), []
    for _ in range(8):
        trainer.step = 0
        found.append(trainer.advance()["patch"])
    assert found[-1] < 0.8 * found[0]


def test_batches_depend_on_seed_phase_and_step_alone():
    one, two = (training_batch(0, 1, PHASES[1], 7) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["pixels"], training_batch(0, 1, PHASES[1], 8)["pixels"])


def test_every_patch_is_trained_on():
    """Which tokens the model sees follows from the window alone, never from what is drawn."""
    batch = training_batch(0, 2, PHASES[2], 0)
    assert torch.equal(batch["patches"], torch.arange(GRID * GRID)[None])
    window = training_batch(0, 0, PHASES[0], 0)["patches"]
    assert window.shape == (2, 144) and torch.equal(window, window.sort(1).values)
    assert np.array_equal(patch_ids((0, 0, 192)), np.arange(GRID * GRID))


def test_objects_choose_no_tokens():
    """Labels made from the objects of another scene leave what is given to the model as it was."""
    (made, asked), (other, _) = scene_questions(2), scene_questions(1)
    relabelled = replace(made, objects=other.objects), [[replace(q, mentions=())] for q in asked]
    one = encode_scene(made, [[q] for q in asked], row_length(1))
    two = encode_scene(*relabelled, row_length(1))
    for name in one:
        assert np.array_equal(one[name], two[name]) == (name in (*INPUTS, "labels")), name


@pytest.mark.parametrize("index", [1, 2], ids=["windows", "whole"])
def test_labels_choose_no_tokens(model, index, monkeypatch):
    """Features and hidden states of a batch follow from what is given to the model alone."""
    batch = training_batch(0, index, replace(PHASES[index], rows=8), 0)
    order = torch.Generator().manual_seed(0)
    mixed = {n: v.flatten()[torch.randperm(v.numel(), generator=order)].view_as(v) for n, v in batch.items()}
    mixed |= {name: batch[name] for name in INPUTS}
    assert {name for name in batch if torch.equal(batch[name], mixed[name])} == set(INPUTS)
    kept = []

    def recorded(function):
        def call(*args):
            out = function(*args)
            kept.extend(out if isinstance(out, tuple) else (out,))
            return out

        return call

    for function in (tower_features, language_states):
        monkeypatch.setattr(tiny_forward, function.__name__, recorded(function))
    heads = Heads(model.config.vision_config.hidden_size)
    for one in (batch, mixed):
        losses(model, heads, one, True)
    assert len(kept) == 8 and kept[0].shape[:2] == batch["patches"].shape
    assert all(map(torch.equal, kept[:4], kept[4:]))


@pytest.mark.parametrize("index", [1, 2], ids=["windows", "whole"])
def test_every_patch_takes_part_in_the_answers(model, index, monkeypatch):
    batch = training_batch(0, index, PHASES[index], 0)
    count = batch["patches"].shape[1]
    pixels, features = batch["pixels"].float().requires_grad_(), []

    def kept(*args):
        features.append(tower_features(*args))
        return features[0]

    monkeypatch.setattr(tiny_forward, "tower_features", kept)
    heads = Heads(model.config.vision_config.hidden_size)
    loss = losses(model, heads, batch | {"pixels": pixels}, True)["answer"]
    of_pixels, of_features = torch.autograd.grad(loss, [pixels, features[0]])
    per_patch = torch.nn.functional.avg_pool2d(of_pixels.abs(), PATCH).sum(1)
    assert count == (576 if index == 2 else 144) == per_patch[0].numel()
    assert of_features.shape[1] == count and (of_features.abs().sum(-1) > 0).all()
    assert (per_patch > 0).all()


def test_conversations_depend_on_no_picture(monkeypatch):
    """Whether a batch holds conversations is drawn apart from its pictures."""

    def item(rng, phase, turns):
        return {"draw": np.array(rng.random()), "turns": np.array(turns)}

    monkeypatch.setattr(tiny_batch, "_training_item", item)
    phase, steps = Phase("ask", 600, 4, 4, chat_share=0.5), range(600)
    drawn = [training_batch(0, 1, phase, step) for step in steps]
    chat = torch.stack([batch["turns"] for batch in drawn]) == 4
    low = torch.stack([batch["draw"] for batch in drawn]) < 0.5
    assert abs(chat[:, 0].double().mean() - 0.5) < 4 * 0.5 / len(steps) ** 0.5
    assert ((chat == low).double().mean(0) - 0.5).abs().max() < 4 * 0.5 / len(steps) ** 0.5  # of each picture


def test_labels_sit_where_the_answer_is_predicted():
    _, asked = scene_questions(0)
    row = tiny_batch.encode_row(asked[:3], row_length(3))
    ids = word_ids()
    at = np.flatnonzero((row["labels"] != IGNORE) & (row["labels"] != ids["</s>"]))
    assert len(at) == 3 and all(row["tokens"][at] == ids["assistant:"])
    assert row["labels"][at].tolist() == [ids[q.answer] for q in asked[:3]] == row["tokens"][at + 1].tolist()
    assert all(row["labels"][at + 1] == ids["</s>"])


def test_shared_forward_equals_the_ordinary_model(model, processor):
    made, asked = scene_questions(1)
    batch = stack([encode_scene(made, [[q] for q in asked[:4]], row_length(1))])
    with torch.no_grad():
        features = tower_features(model, batch["pixels"], batch["patches"])
        states = language_states(model, features, batch["patches"], batch["tokens"])[-1]
        _, accuracy = answer_loss(model, states, batch["labels"])
        shared, right = model.lm_head(states)[0], []
        for row, question in enumerate(asked[:4]):
            text = PROMPT.format(question.text)
            inputs = processor(images=made.pixels, text=text, return_tensors="pt")
            alone = model(**inputs).logits[0, -1]
            at = int((batch["labels"][0, row] != IGNORE).nonzero()[0, 0])
            torch.testing.assert_close(shared[row, at], alone, atol=2e-4, rtol=1e-4)
            right.append(int(alone.argmax()) == int(batch["labels"][0, row, at]))
    assert accuracy == sum(right) / 4


def test_scoring_gives_the_answers_of_generate(model, processor):
    made, asked = scene_questions(2)
    texts = [q.text for q in asked[:4]]
    scored = answers(model, processor, made.pixels, texts)
    for text, answer in zip(texts, scored, strict=True):
        inputs = processor(images=made.pixels, text=PROMPT.format(text), return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=1)[0, -1]
        assert processor.tokenizer.convert_ids_to_tokens(int(out)) == answer


@pytest.mark.parametrize(
    "settings", [{"calibration": "distance"}, {"calibration": "none"}, {"where": "projector"}], ids=str
)
def test_scoring_follows_an_attached_reducer(tiny, settings):
    model, processor = tiny
    picture, asked = scene(5)
    texts = [q.text for q in asked[:3]]
    with pitome_mllm.attach(model, keep=36, **settings):
        scored = answers(model, processor, picture, texts)
        for text, answer in zip(texts, scored, strict=True):
            inputs = processor(images=picture, text=PROMPT.format(text), return_tensors="pt")
            out = model.generate(**inputs)[0, inputs.input_ids.shape[1] :]
            assert processor.tokenizer.convert_ids_to_tokens(out.tolist()) == [answer, "</s>"]


def test_questions_are_scored_at_the_positions_behind_the_picture(tiny):
    """Not behind the last position that a merged token has."""
    model, processor = tiny
    picture, asked = scene(5)
    seen = []
    with pitome_mllm.attach(model, keep=36):
        language = model.model.language_model
        hook = language.register_forward_pre_hook(
            lambda *given: seen.append(given[2]["position_ids"]), with_kwargs=True
        )
        answers(model, processor, picture, [asked[0].text])
        prompt = processor(images=picture, text=PROMPT.format(asked[0].text), return_tensors="pt")
        model.generate(**prompt, max_new_tokens=1)
        hook.remove()
    scored, generated = seen[1][0], seen[2][0]
    assert torch.equal(scored, generated[-len(scored) :])


def test_the_embedded_model_answers_as_recorded(tiny):
    """Within two points on the recorded sample, whatever the machine."""
    recorded = json.loads((Path(pitome_mllm.__file__).parent / "tiny" / "accuracy.json").read_text())["sample"]
    records = list(score(*tiny, recorded["split"], recorded["questions"]))
    accuracy = sum(r.right for r in records) / len(records)
    assert abs(accuracy - recorded["accuracy"]) <= 0.02
    assert (
        accuracy >= 0.75
        and accuracy > sum(blind_answer(r.question) == r.question.answer for r in records) / len(records) + 0.3
    )


def test_the_shipped_model_is_what_is_trained(tiny):
    shipped, made = tiny[0].state_dict(), build_model().state_dict()
    assert {name: value.shape for name, value in shipped.items()} == {n: v.shape for n, v in made.items()}
    assert all(value.dtype == torch.float32 for value in made.values())
    assert tiny[1].tokenizer.get_vocab() == word_ids()


def test_an_exported_model_loads_and_ignores_case_and_punctuation(straight, tmp_path, monkeypatch):
    monkeypatch.setattr(export_tiny, "PHASES", PHASES)
    export_tiny.main([str(straight), "--to", str(tmp_path / "model"), "--limit", "1"])
    assert {p.name for p in (tmp_path / "model").iterdir()} == {p.name for p in TINY.iterdir()}
    model, loaded = pitome_mllm.load(tmp_path / "model")
    trained = torch.load(straight / "checkpoint.pt")["parts"]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, trained[f"model.{name}"].half().float()), name
    assert model.generation_config.eos_token_id == 3
    card = (tmp_path / "model" / "README.md").read_text()
    assert "It knows 54 words" in card and "7 generated pictures in 4 steps" in card
    ids = [loaded.tokenizer(text).input_ids for text in ("What COLOR is the star?", "what colour is the star")]
    assert ids[0] == ids[1] and loaded.tokenizer.unk_token_id not in ids[0]
    assert loaded.tokenizer("where is my hat?").input_ids.count(loaded.tokenizer.unk_token_id) == 3
    inputs = loaded(images=np.zeros((50, 70, 3), np.uint8), text=PROMPT.format("is there a 7?"), return_tensors="pt")
    assert (inputs.input_ids == loaded.tokenizer.convert_tokens_to_ids("<image>")).sum() == GRID * GRID
    assert inputs.pixel_values.shape == (1, 3, 192, 192)
