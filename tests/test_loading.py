"""load(): the embedded model, folders, quantised weights, and a clear sentence for every mistake."""

import importlib.util
import json
import pickle
import shutil

import pytest
import torch
from models import QUESTION, build, picture, processor
from packed import PACKED
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from pitome_mllm import attach, load, loading
from pitome_mllm.serving.prompts import message


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with random weights in half precision and its processor."""
    path = tmp_path_factory.mktemp("checkpoint")
    build().half().save_pretrained(path)
    processor().save_pretrained(path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    """The checkpoint in a folder that a test may spoil."""
    return shutil.copytree(folder, tmp_path / "copy")


def generate(model, process, new_tokens=3):
    inputs = process(images=picture(0), text=QUESTION, return_tensors="pt").to(model.device, dtype=model.dtype)
    out = model.generate(**inputs, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens)
    return out[:, inputs["input_ids"].shape[1] :]


def test_tiny_is_ready_to_use():
    model, process = load("tiny")
    assert not model.training and model.dtype == torch.float32 and model.device.type == "cpu"
    assert isinstance(model, LlavaForConditionalGeneration)
    with attach(model, keep=144) as handle:
        assert generate(model, process).shape == (1, 3)
    assert handle.plan.available == 576 and handle.plan.keep == 144


def test_a_folder_keeps_its_own_dtype(folder):
    assert load(folder)[0].dtype == torch.float16
    assert load(str(folder), dtype="bfloat16")[0].dtype == torch.bfloat16
    assert load(folder, dtype=torch.float32, device="cpu")[0].dtype == torch.float32


def test_families_behind_the_projector_load_by_their_names(tmp_path):
    family = next(family for family in PACKED if family.title == "Aya Vision")
    family.build().save_pretrained(tmp_path)
    family.chat().save_pretrained(tmp_path)
    model, process = load(tmp_path)
    prompt = process.apply_chat_template([message("how many are there", 1)], add_generation_prompt=True)
    inputs = process(images=picture(0), text=prompt, return_tensors="pt")
    with attach(model, keep=0.25) as handle:
        assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
        assert {*handle.stats.lengths} == {4}


def test_a_processor_that_needs_torchvision_says_so(copy, monkeypatch):
    def failing(*args, **kwargs):
        raise ImportError("\nQwen2VLVideoProcessor requires the Torchvision library but it was not found. Check out")

    monkeypatch.setattr(loading.transformers.AutoProcessor, "from_pretrained", failing)
    said = r"\(Qwen2VLVideoProcessor requires the Torchvision library but it was not found\); install torchvision$"
    with pytest.raises(ValueError, match=said):
        load(copy)


def test_device_auto_places_the_model(folder):
    model, process = load(folder, dtype="float32", device="auto")
    assert generate(model, process).shape == (1, 3)


@pytest.mark.parametrize("bits, layer", [(8, "Linear8bitLt"), (4, "Linear4bit")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantised_models_merge_and_generate(folder, bits, layer, dtype):
    model, process = load(folder, bits=bits, dtype=dtype)
    keys = {type(m).__name__ for n, m in model.named_modules() if n.endswith("k_proj")}
    assert keys == {layer} and not model.training
    plain = generate(model, process)
    with attach(model, keep=144) as handle:
        assert generate(model, process).shape == (1, 3)
        assert handle.stats.tokens_after == 144
    assert torch.equal(generate(model, process), plain)


def test_a_processor_that_says_nothing_of_the_tower_is_completed(copy):
    path = copy / "processor_config.json"
    settings = json.loads(path.read_text())
    for key in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"):
        settings.pop(key, None)
    path.write_text(json.dumps(settings))
    model, process = load(copy, dtype="float32")
    assert generate(model, process).shape == (1, 3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"bits": 3}, "bits=3 is not possible; choose 4 or 8"),
        ({"bits": True}, "bits=True is not possible"),
        ({"bits": "4"}, "bits='4' is not possible"),
        ({"dtype": "int8"}, "dtype='int8' is not possible; choose one of float32, float16, bfloat16"),
        ({"dtype": torch.int64}, "dtype=torch.int64 is not possible"),
        ({"device": "toaster"}, "device='toaster' is not a device; possible here: cpu"),
        ({"device": "cuda:99"}, "device='cuda:99' is not available; possible here: cpu"),
        ({"device": "meta"}, "device='meta' is not available"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load("tiny", **arguments)


def test_quantising_without_bitsandbytes_names_the_extra(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else real(name, *a)
    )
    with pytest.raises(ValueError, match=r"bits=4 needs bitsandbytes; .*pip install '\.\[bnb\]'"):
        load("tiny", bits=4)


def test_names_that_lead_nowhere(tmp_path):
    for wrong in ("./nowhere", "/nowhere/at/all", "a/b/c", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="no folder .*give 'tiny', an existing folder, or a hub name"):
            load(wrong)
    with pytest.raises(ValueError, match="the model's name is empty"):
        load("")
    with pytest.raises(ValueError, match="neither a folder here nor a checkpoint that the Hugging Face hub gave"):
        load("nobody/no-such-model")
    with pytest.raises(ValueError, match="has no config.json"):
        load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; expected the folder"):
        load(tmp_path / "file")
    with pytest.raises(ValueError, match="expected a model's name or folder, got int"):
        load(7)


def spoil(path, **changes):
    config = json.loads((path / "config.json").read_text())
    config.update(changes)
    (path / "config.json").write_text(json.dumps(config))


def test_unsupported_families_are_named(copy):
    spoil(copy, model_type="bert", architectures=["BertModel"])
    with pytest.raises(ValueError, match=r"unsupported family BertModel .*supported: .*LlavaForConditionalGeneration"):
        load(copy)
    spoil(copy, model_type="bert", architectures=None)
    with pytest.raises(ValueError, match=r"unsupported family 'bert'; supported: .*llava"):
        load(copy)
    spoil(copy, model_type="nonsense", architectures=None)
    with pytest.raises(ValueError, match=r"unsupported family in .*nonsense.*supported: .*llava"):
        load(copy)
    spoil(copy, model_type="llava", architectures=["LlavaMptForCausalLM"])
    with pytest.raises(ValueError, match="unsupported family LlavaMptForCausalLM .*llava-hf"):
        load(copy)


def test_checkpoints_of_the_original_package_say_what_they_need(copy):
    spoil(copy, model_type="llava_llama", architectures=["LlavaLlamaForCausalLM"])
    with pytest.raises(ValueError, match=r"original llava package, which is not installed; .*llava-torch.*llava-hf"):
        load(copy)
    with pytest.raises(ValueError, match=r"bits=4 is not possible with a checkpoint of the original llava package"):
        load(copy, bits=4)


def test_missing_parts_are_named(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot load the weights of"):
        load(copy)


def test_weights_that_are_no_weights_are_named(copy):
    (copy / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"cannot read the weights '.*copy/model.safetensors': .*damaged.* again$"):
        load(copy)


def test_weights_that_were_cut_short_are_named(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"cannot read the weights '.*copy/model.safetensors': .*cut short .* again$"):
        load(copy)


@pytest.mark.parametrize("part, weight", [("text_config", "mlp.down_proj"), ("vision_config", "mlp.fc1")])
def test_weights_of_other_shapes_than_the_configuration_says(copy, part, weight):
    config = json.loads((copy / "config.json").read_text())
    config[part]["intermediate_size"] += 8
    spoil(copy, **{part: config[part]})
    shapes = rf"{weight}\S* has the shape \(.*128.*\), the configuration says \(.*136.*\)"
    with pytest.raises(ValueError, match=rf"do not fit its config.json: .*{shapes}; take config.json and weights"):
        load(copy)


@pytest.mark.parametrize("content", [b"", b"{junk", b"\xff\xfe\x00"])
def test_a_configuration_that_cannot_be_read(copy, content):
    (copy / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read config.json in folder '.*copy' .*; copy it again") as caught:
        load(copy)
    assert "neither a folder" not in str(caught.value)


def test_a_configuration_with_an_impossible_value(copy):
    spoil(copy, vision_feature_select_strategy="nonsense")
    with pytest.raises(ValueError, match="config.json of .*vision_feature_select_strategy.*'full'.*got nonsense"):
        load(copy)


def test_weights_that_are_not_there_are_not_made_up(copy):
    weights = load_file(copy / "model.safetensors")
    dropped = next(k for k in weights if "multi_modal_projector" in k)
    save_file({k: v for k, v in weights.items() if k != dropped}, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of LlavaForConditionalGeneration, such as .*projector"):
        load(copy)


def test_a_folder_without_processor_is_refused(copy):
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (copy / file).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="cannot load the processor of"):
        load(copy)


def test_the_embedded_model_warns_once_of_words_that_it_does_not_know(tmp_path, recwarn):
    processor = load("tiny")[1]
    processor.save_pretrained(tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path)).__name__ == type(processor.tokenizer).__name__
    pickle.loads(pickle.dumps(processor.tokenizer))
    loading._warn_of_unknown_words.cache_clear()
    processor(text="is there a red star?")
    assert not recwarn.list
    for question in ("is there a zebra?", "is there a zebra?"):
        processor(text=question)
    (warning,) = recwarn.list
    assert "drawn shapes and handwritten digits" in str(warning.message) and warning.filename == __file__
