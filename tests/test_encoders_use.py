"""Encoders alone as people use them: pipelines, half precision, 8 bit, adapters, training, graphs."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from encoders import BY_MODEL, PATCHES, pixels
from families import clip_pictures
from models import picture, tokenizer
from peft import LoraConfig, get_peft_model
from test_graphs import Recorded
from transformers import BitsAndBytesConfig

from pitome_mllm import Attachment, attach
from pitome_mllm.families.encoders import ENCODERS
from pitome_mllm.hooks import graphs

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
QUARTER = PATCHES // 4
SHAPES = (
    "CLIPModel",
    "SiglipForImageClassification",
    "Dinov2ForImageClassification",
    "DINOv3ViTModel",
    "BlipVisionModel",
)
TASKS = {
    "zero-shot-image-classification": ("CLIPModel", {"candidate_labels": ["star", "circle"]}),
    "image-classification": ("ViTForImageClassification", {}),
    "image-feature-extraction": ("Dinov2Model", {}),
}


@pytest.mark.parametrize("task,name,options", [(task, *row) for task, row in TASKS.items()], ids=list(TASKS))
def test_pipelines(task, name, options):
    model = BY_MODEL[name].build()
    made = transformers.pipeline(task, model, tokenizer=tokenizer(), image_processor=clip_pictures())
    pictures = [picture(0), picture(1)]
    expected = made(pictures, **options)
    with attach(model, keep=1.0) as handle:
        assert made(pictures, **options) == expected
        handle.update(keep=QUARTER)
        assert made(pictures, **options) != expected
        assert handle.stats.tokens_after == QUARTER
    assert made(pictures, **options) == expected


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(name, dtype):
    row = BY_MODEL[name]
    model, plain, x = row.build().to(dtype), row.build().to(dtype), pixels(0, 1).to(dtype)
    expected = row.call(plain, x)
    with attach(model, keep=1.0) as handle:
        seen = row.call(model, x)
        assert all(torch.equal(seen[key], expected[key]) for key in expected)
        handle.update(keep=QUARTER)
        for value in row.call(model, x).values():
            assert value.isfinite().all() and value.dtype == dtype


def test_a_q_former_in_full_precision_reads_a_tower_in_half(caplog):
    row, seen = BY_MODEL["Blip2VisionModelWithProjection"], []
    model = row.build().bfloat16()
    model.query_tokens.data = model.query_tokens.data.float()  # as transformers loads it
    model.qformer.float(), model.vision_projection.float()
    attach(model, keep=QUARTER)
    read = model.qformer.encoder.layer[0].crossattention.attention
    read.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
    row.call(model, pixels(0).bfloat16())
    assert seen[0]["encoder_attention_mask"].max() > 0 and seen[0]["encoder_hidden_states"].dtype == torch.float32
    assert "other tokens" not in caplog.text


@pytest.mark.filterwarnings("ignore:.*MatMul8bitLt.*")
@pytest.mark.parametrize("name", ["CLIPModel", "ViTForImageClassification", "BlipVisionModel"])
def test_8_bit(name, tmp_path):
    row, x = BY_MODEL[name], pixels(0, 1).float()
    row.build().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True)
    kind = getattr(transformers, name)
    model = kind.from_pretrained(
        tmp_path, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    ).eval()
    expected = row.call(model, x)
    with attach(model, "pitome", published=True, keep=1.0) as handle:
        seen = row.call(model, x)
        assert all(torch.equal(seen[key], expected[key]) for key in expected)
        handle.update(keep=QUARTER)
        assert all(value.isfinite().all() for value in row.call(model, x).values())
        assert handle.stats.tokens_after == QUARTER


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "name", ["ViTForImageClassification", "Dinov2ForImageClassification", "SiglipForImageClassification"]
)
def test_training_with_adapters(name, checkpointing):
    """Gradients reach the adapters of every block, the same with recomputation as without."""
    row, x = BY_MODEL[name], pixels(0, 1)
    torch.manual_seed(0)
    model = get_peft_model(row.build(), LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], r=2)).double().train()
    for key, weight in model.named_parameters():
        if "lora_B" in key:
            weight.data.normal_()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with attach(model, "pitome", published=True, keep=QUARTER):
        model(pixel_values=x, labels=torch.tensor([0, 1])).loss.backward()
    grads = [weight.grad.abs().sum() for key, weight in model.named_parameters() if "lora_B" in key]
    assert len(grads) >= 18 and all(grad > 0 for grad in grads)


def test_the_plain_model_runs_while_training_keeps_a_merged_run():
    """As in distillation: recomputation holds on to the state of the student's call."""
    row, x = BY_MODEL["SiglipVisionModel"], pixels(0, 1)
    model, plain = row.build().train(), row.build()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with attach(model, keep=QUARTER) as handle:
        student = model(x)
        with handle.using(None):
            seen, expected = row.call(model, x), row.call(plain, x)
            assert all(torch.equal(seen[key], expected[key]) for key in expected)
        sum(value.sum() for value in student.values()).backward()


@pytest.mark.parametrize("name", [*SHAPES, "ViTMAEModel", "SiglipModel", "Blip2ForImageTextRetrieval"])
def test_graphs_serve_encoders(name, monkeypatch, caplog):
    """Stood in for on a processor: the same bits with a graph, pooling and readers included."""
    monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    monkeypatch.setattr(graphs, "Capture", Recorded)
    monkeypatch.setattr(graphs, "new_pool", object)
    monkeypatch.setattr(Recorded, "made_so_far", [])
    row, x = BY_MODEL[name], pixels(0, 1)
    model = row.build()
    with attach(model, keep=QUARTER, graph=True) as handle, caplog.at_level("INFO"):
        for given in (x, x.flip(0), x):
            with handle.using(graph=False):
                expected, stats = row.call(model, given), handle.stats
            seen = row.call(model, given)
            assert all(torch.equal(seen[key], expected[key]) for key in expected)
            assert torch.equal(handle.stats.groups, stats.groups)
    assert [made.replays for made in Recorded.made_so_far] == [2], caplog.text


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipForImageClassification", "Blip2ForImageTextRetrieval"])
def test_copies_threads_and_files_are_as_with_any_model(name, tmp_path):
    row, x = BY_MODEL[name], pixels(0, 1)
    model, plain, other = row.build().float(), row.build().float(), row.build(seed=2).float()
    x = x.float()
    expected, others = row.call(plain, x), row.call(other, x)
    handle = attach(model, keep=QUARTER)
    merged = row.call(model, x)
    for part in (model, model.get_submodule(ENCODERS[name].tower)):
        with pytest.raises(ValueError, match="already carries pitome"):
            attach(part, keep=QUARTER)
    with pytest.raises(ValueError, match="cannot be pickled"):
        pickle.dumps(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path)
    assert_equal(row.call(type(plain).from_pretrained(tmp_path, dtype=torch.float32).eval(), x), expected)
    with handle.using(keep=PATCHES // 2), ThreadPoolExecutor(1) as pool:
        assert_equal(pool.submit(row.call, model, x).result(), merged)  # what `using` chose is another thread's
        row.call(model, x)
        assert handle.stats.tokens_after == PATCHES // 2
    copied = copy.deepcopy(model)
    with attach(other, keep=PATCHES // 2):
        handle.remove()
        assert_equal(row.call(model, x), expected)
        assert_equal(row.call(copied, x), merged)
    Attachment.of(copied).remove()
    assert_equal(row.call(copied, x), expected)
    assert_equal(row.call(other, x), others)


def assert_equal(seen, expected):
    assert seen.keys() == expected.keys() and all(torch.equal(seen[key], expected[key]) for key in expected)
