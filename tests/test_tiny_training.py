"""The training recipe of the embedded model: exact batches, exact resuming, and the ordinary model's sums."""

import ast
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import pitome_mllm
from pitome_mllm_eval import muon, tiny_batch, tiny_forward
from pitome_mllm_eval.benchmark import scene, scene_questions
from pitome_mllm_eval.scenes import GRID
from pitome_mllm_eval.score import PROMPT, answers, score
from pitome_mllm_eval.tiny_batch import IGNORE, Phase, encode_scene, patch_ids, row_length, stack, training_batch
from pitome_mllm_eval.tiny_forward import answer_loss, language_states, tower_features
from pitome_mllm_eval.tiny_model import build_model, build_processor, save_release, word_ids
from pitome_mllm_eval.tiny_trainer import Trainer

PHASES = (
    Phase("see", 1, 2, 0, side=96, ask=False, chat_share=0.0),
    Phase("ask-small", 2, 2, 4, side=96, chat_share=0.5),
    Phase("ask-full", 1, 1, 2),
)


@pytest.fixture(scope="module")
def model():
    """An untrained model with sharper answers than its small initial weights give."""
    model = build_model(3).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def run(trainer: Trainer, steps: int) -> None:
    for _ in range(steps):
        trainer.advance(trainer.batch(trainer.step))


def test_resuming_continues_exactly(tmp_path):
    straight, first = Trainer(PHASES), Trainer(PHASES)
    run(straight, 4)
    run(first, 2)
    torch.save(first.state(), tmp_path / "state.pt")
    second = Trainer(PHASES, seed=0)
    second.load(torch.load(tmp_path / "state.pt"))
    run(second, 2)
    expected, got = straight.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert second.pictures == straight.pictures


def test_a_step_learns():
    trainer = Trainer((Phase("see", 8, 4, 0, side=96, ask=False, warmup=1),))
    batch = trainer.batch(0)
    losses = [trainer.advance(batch)["patch"] for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0]


def test_batches_depend_on_seed_phase_and_step_alone():
    one, two = (training_batch(0, 1, PHASES[1], 7) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["pixels"], training_batch(0, 1, PHASES[1], 8)["pixels"])
    parts = [training_batch(0, 1, PHASES[1], 7, part, 2) for part in range(2)]
    assert torch.equal(one["tokens"], torch.cat([part["tokens"] for part in parts]))


def test_every_patch_is_trained_on():
    """Which tokens the model sees follows from the window alone, never from what is drawn."""
    batch = training_batch(0, 2, PHASES[2], 0)
    assert torch.equal(batch["patches"], torch.arange(GRID * GRID)[None])
    window = training_batch(0, 0, PHASES[0], 0)["patches"]
    assert window.shape == (2, 144) and torch.equal(window, window.sort(1).values)
    assert np.array_equal(patch_ids((0, 0, 192)), np.arange(GRID * GRID))
    tree = ast.parse(inspect.getsource(tiny_forward.tower_features) + inspect.getsource(tiny_forward.language_states))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"kind", "colour", "centre", "labels", "batch_labels", "objects"}


def test_labels_sit_where_the_answer_is_predicted():
    _, asked = scene_questions(0)
    row = tiny_batch.encode_row(asked[:3], row_length(3))
    ids = word_ids()
    at = np.flatnonzero(row["category"] != IGNORE)
    assert len(at) == 3 and all(row["tokens"][at] == ids["assistant:"])
    assert row["labels"][at].tolist() == [ids[q.answer] for q in asked[:3]] == row["tokens"][at + 1].tolist()
    assert all(row["labels"][at + 1] == ids["</s>"])


def test_shared_forward_equals_the_ordinary_model(model, processor):
    made, asked = scene_questions(1)
    batch = stack([encode_scene(made, [[q] for q in asked[:4]], row_length(1))])
    with torch.no_grad():
        features = tower_features(model, batch["pixels"], batch["patches"])
        states = language_states(model, features, batch["patches"], batch["tokens"])[-1]
        _, hits = answer_loss(model, states, batch["labels"])
        shared = model.lm_head(states)[0]
        for row, question in enumerate(asked[:4]):
            text = PROMPT.format(question.text)
            inputs = processor(images=made.pixels, text=text, return_tensors="pt")
            alone = model(**inputs).logits[0, -1]
            at = int((batch["category"][0, row] != IGNORE).nonzero()[0, 0])
            torch.testing.assert_close(shared[row, at], alone, atol=2e-4, rtol=1e-4)
    assert hits.shape == batch["labels"].shape


def test_scoring_gives_the_answers_of_generate(model, processor):
    made, asked = scene_questions(2)
    texts = [q.text for q in asked[:4]]
    scored = answers(model, processor, made.pixels, texts)
    for text, answer in zip(texts, scored, strict=True):
        inputs = processor(images=made.pixels, text=PROMPT.format(text), return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=1)[0, -1]
        assert processor.tokenizer.convert_ids_to_tokens(int(out)) == answer


@pytest.fixture(scope="module")
def tiny():
    return pitome_mllm.load("tiny")


@pytest.mark.parametrize(
    "settings", [{"positions": "original"}, {"positions": "compact"}, {"where": "projector"}], ids=str
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


def test_the_embedded_model_answers_as_recorded(tiny):
    """Within two points on the recorded sample, whatever the machine."""
    recorded = json.loads((Path(pitome_mllm.__file__).parent / "tiny" / "accuracy.json").read_text())["sample"]
    records = list(score(*tiny, recorded["split"], recorded["questions"]))
    accuracy = sum(r.right for r in records) / len(records)
    assert abs(accuracy - recorded["accuracy"]) <= 0.02
    assert accuracy >= 0.75 and accuracy > sum(r.blind == r.answer for r in records) / len(records) + 0.3


def test_release_loads_and_ignores_case_and_punctuation(model, processor, tmp_path):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    save_release(build_model(), tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    ids = [loaded.tokenizer(text).input_ids for text in ("What COLOR is the star?", "what colour is the star")]
    assert ids[0] == ids[1] and loaded.tokenizer.unk_token_id not in ids[0]
    assert loaded.tokenizer("where is my hat?").input_ids.count(loaded.tokenizer.unk_token_id) == 3
    inputs = loaded(images=np.zeros((50, 70, 3), np.uint8), text=PROMPT.format("is there a 7?"), return_tensors="pt")
    assert (inputs.input_ids == loaded.tokenizer.convert_tokens_to_ids("<image>")).sum() == GRID * GRID
    assert inputs.pixel_values.shape == (1, 3, 192, 192)
    small = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert small.dtype == torch.float16 and small.generation_config.eos_token_id == 3
    assert (tmp_path / "model.safetensors").stat().st_size < 9e6


def test_muon_orthogonalises():
    stack_ = torch.randn(3, 16, 40)
    singular = torch.linalg.svdvals(muon.orthogonalise(stack_))
    assert 0.5 < singular.min() and singular.max() < 1.4
