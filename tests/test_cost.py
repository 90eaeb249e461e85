"""``pitome-mllm cost``: its page is up to date, its figures are the estimate's, and the paper's are found again."""

import json
import re
from functools import lru_cache, partial
from pathlib import Path

import pytest
import torch
from checks import command_line
from transformers import CLIPVisionModel, LlamaForCausalLM, LlavaForConditionalGeneration

from pitome_mllm import estimate
from pitome_mllm.costs import flops, memory
from pitome_mllm.costs.memory import largest_batch
from pitome_mllm.costs.published import SHAPES, get_shape
from pitome_mllm.families.geometry import geometry

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cost.md"


@pytest.fixture
def run(capsys):
    """Run ``pitome-mllm cost``; returns the exit code, stdout and stderr."""
    return partial(command_line, capsys, "cost")


def test_the_page_is_what_the_command_prints(run):
    code, out, err = run("--markdown")
    assert (code, err) == (0, "")
    assert out == PAGE.read_text(), "write it anew: pitome-mllm cost --markdown > docs/cost.md"


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_their_published_sizes(name):
    config = get_shape(name).config()
    vision, text = getattr(config, "vision_config", config), getattr(config, "text_config", None)
    patches = 256 if name == "vit-mae-h" else 196 if vision.image_size == 224 else 576
    assert (vision.image_size // vision.patch_size) ** 2 == patches
    assert (text is None) == ("llava" not in name)
    published = {"clip-l-336": 381.9, "vit-mae-h": 334.6}  # 2 * 12 * N * C^2 and so on, worked out by hand
    if name in published:
        assert estimate(config).flops / 1e9 == pytest.approx(published[name], rel=1e-3)


# hidden, intermediate, blocks, heads, key-value heads, vocabulary: Vicuna 1.5, with 64 rows more as llava-hf pads them.
VICUNA = {"7b": (4096, 11008, 32, 32, 32, 32000 + 64), "13b": (5120, 13824, 40, 40, 40, 32000 + 64)}
LLAMA = {"7b": 6_738_415_616, "13b": 13_015_864_320}  # parameters, as published


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.text])
def test_llms_are_those_that_were_published(name):
    size = name.split("-")[-1]
    text = get_shape(name).config().text_config
    own = (text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.num_attention_heads)
    assert (*own, text.num_key_value_heads, text.vocab_size) == VICUNA[size]
    with torch.device("meta"):
        llm = LlamaForCausalLM(text)
    assert parameters(llm) == LLAMA[size] + 2 * 64 * text.hidden_size


def test_towers_and_a_whole_model_have_the_published_parameters():
    with torch.device("meta"):
        clip, mae = (CLIPVisionModel(get_shape(name).config()) for name in ("clip-l-336", "vit-mae-h"))
        seven = LlavaForConditionalGeneration(get_shape("llava-1.5-7b").config())
    assert parameters(clip) == 303_507_456
    assert parameters(seven) == 7_063_427_072  # of llava-hf/llava-1.5-7b-hf
    head, norm, bias = 1280 * 1000 + 1000, 2 * 1280, 1280  # CLIP: no classifier, no bias of patches, one more norm
    assert parameters(mae) == 632_045_800 - head - bias + norm


def test_rows_are_the_estimate_s(run):
    shape = SHAPES["llava-next-7b"]
    config = shape.config()
    code, out, _ = run("llava-next-7b", "--ratio", 0.95, "--keep", 72, "--new-tokens", 9, "--memory", 30, "--json")
    plain, ratio, keep = json.loads(out)["llava-next-7b"]["rows"]
    counts = {"images": 5, "text_tokens": 40, "new_tokens": 9}
    expected = {
        name: estimate(config, "pitome", **counts, **{name: value}) for name, value in (("ratio", 0.95), ("keep", 72))
    }
    whole = estimate(config, **counts)
    assert code == 0 and [row["setting"] for row in (plain, ratio, keep)] == ["plain", "ratio 0.95", "keep 72"]
    assert (plain["tokens"], ratio["tokens"], keep["tokens"]) == (2880, 5 * 183, 360)
    for row, cost in ((ratio, expected["ratio"]), (keep, expected["keep"])):
        assert (
            row["gflops"] == pytest.approx(cost.flops / 1e9) == pytest.approx(row["tower_gflops"] + row["llm_gflops"])
        )
        assert row["saved"] == pytest.approx(1 - cost.flops / whole.flops) and row["kv_mb"] == cost.kv_bytes / 1e6
    assert plain["saved"] == 0 and plain["batch"] == largest_batch(config, 30e9, **counts)
    assert keep["batch"] == largest_batch(config, 30e9, "pitome", keep=72, **counts) > plain["batch"]


def test_the_paper_s_ratio_stands_in_the_notes(run):
    found = json.loads(run("llava-1.5-13b", "--keep", 0.5, "--json")[1])["llava-1.5-13b"]
    assert "ratio for it, 0.925, the method as published saves 77.0%" in found["notes"][-1]


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.paper_cost])
def test_the_paper_s_table_of_imagenet_is_counted(run, name):
    config, paper = SHAPES[name].config(), SHAPES[name].paper_cost
    counts = paper.counts(geometry(config).patches, geometry(config).blocks)
    merged = estimate(config, "pitome", counts=counts, published=True).flops
    assert estimate(config).flops / 2e9 == pytest.approx(paper.plain, rel=2e-3)  # some of theirs are no matrix products
    assert merged / 2e9 == pytest.approx(paper.merged, rel=0.02)
    note = json.loads(run(name, "--json")[1])[name]["notes"][-1]
    assert f"{paper.removed} patches less" in note and f"{merged / 2e9:.2f} here" in note


def test_modules_are_built_once_and_merges_counted_once(monkeypatch, run):
    built, merges = [], []
    sizes, counted = memory._sizes, flops._counted.__wrapped__
    monkeypatch.setattr(memory, "_SIZES", {})
    monkeypatch.setattr(memory, "_sizes", lambda config: built.append(1) or sizes(config))
    monkeypatch.setattr(flops, "_counted", lru_cache(lambda *given: merges.append(given) or counted(*given)))
    run("llava-1.5-7b", "llava-next-7b")
    assert len(built) == 1 and 0 < len(merges) == len(set(merges))


def test_the_terminal_shows_table_notes_and_conventions(run):
    code, out, err = run("vit-mae-h", "--ratio", 0.95, "--keep", 64)
    said = " ".join(out.split())
    assert (code, err) == (0, "") and "ViT-MAE-H/14" in said and re.search(r"ratio 0.95 +57 +\d+\.\d +\d+\.\d%", out)
    assert "A multiply-add counts as two FLOPs" in said and "LLM, GFLOPs" not in said


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["llava-1.5-8b"], "unknown shape 'llava-1.5-8b'; did you mean 'llava-1.5-7b'? Choices: llava-1.5-7b, "),
        (["clip-l-336", "--method", "tom"], "did you mean 'tome'"),
        (["clip-l-336", "--ratio", "1.5"], "ratio=1.5 is not possible"),
        (["clip-l-336", "--keep", "577"], "keep=577 is more than the 576"),
        (["llava-1.5-7b", "--memory", "0"], "--memory: 0 is not possible; give the GB"),
        (["--memory", "-4"], "--memory: -4 is not possible; give the GB"),
        (["--memory", "much"], "'much'"),
        (["llava-1.5-7b", "--bits", "3"], "bits=3 is not possible"),
        (["llava-1.5-7b", "--text-tokens", "-1"], "text_tokens=-1 is not possible"),
    ],
)
def test_a_mistake_is_one_line(run, arguments, words):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1
