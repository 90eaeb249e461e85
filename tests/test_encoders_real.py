"""What measures encoders with real weights, on made ones: tensors out of an ONNX file, figures, table and plot."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from encoders import BY_MODEL, pixels

from pitome_mllm import attach
from pitome_mllm_eval.encoders import real, report, weights


def test_matrices_are_named_by_their_module_and_made_whole(monkeypatch):
    rng = np.random.default_rng(0)
    whole = {"layer.bias": rng.random(3, np.float32), "onnx::MatMul_2": rng.random((3, 2), np.float32)}
    eight = {
        "onnx::MatMul_1_quantized": rng.integers(-9, 9, (2, 3), np.int8),
        "onnx::MatMul_1_zero_point": np.array([1, 0, -1], np.int8),
        "onnx::MatMul_1_scale": np.array([0.5, 1, 2], np.float32),
    }
    nodes = [
        SimpleNamespace(
            op_type="MatMulInteger", name="/a/q_proj/MatMul_quant", input=["x", "onnx::MatMul_1_quantized"]
        ),
        SimpleNamespace(op_type="MatMul", name="/a/fc1/MatMul", input=["x", "onnx::MatMul_2"]),
        SimpleNamespace(op_type="MatMul", name="/a/MatMul", input=["q", "k"]),
    ]
    held = [SimpleNamespace(name=name, value=value) for name, value in {**whole, **eight}.items()]
    graph = SimpleNamespace(initializer=held, node=nodes)
    onnx = SimpleNamespace(load_from_string=lambda file: SimpleNamespace(graph=graph))
    onnx.numpy_helper = SimpleNamespace(to_array=lambda one: one.value)
    monkeypatch.setitem(sys.modules, "onnx", onnx)
    found = weights.tensors(b"")
    expected = (eight["onnx::MatMul_1_quantized"] - [1.0, 0, -1]) * [0.5, 1, 2]
    assert np.allclose(found["a.q_proj.weight"], expected.T)
    assert np.array_equal(found["a.fc1.weight"], whole["onnx::MatMul_2"].T) and "a.weight" not in found
    assert np.array_equal(found["layer.bias"], whole["layer.bias"])


def test_a_missing_wheel_is_told(tmp_path):
    with pytest.raises(weights.UserError, match="`make real-clip` fetches it"):
        weights.load("clip-vit-b-16", tmp_path)


def test_figures_are_those_of_neighbours():
    plain = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [1, 1]]), dim=-1)
    kinds = np.array(["a", "a", "b", "c", ""])
    same = real.figures(plain, plain, kinds)
    assert same["cosine"] == pytest.approx(1) and same["neighbour"] == same["category"] == 1  # only "a" is asked
    other = real.figures(plain[[2, 1, 0, 3, 4]], plain, kinds)
    assert other["cosine"] < 0.7 and other["neighbour"] < 1


def test_results_of_other_pictures_stay_apart(tmp_path, monkeypatch, capsys):
    out = tmp_path / "real.csv"
    real.check_same(out, 9)
    out.write_text("model,pictures\nclip-vit-b-16,9\n")
    real.check_same(out, 9)
    with pytest.raises(ValueError, match="is of 9 pictures, here are 12; choose another --out"):
        real.check_same(out, 12)
    monkeypatch.setattr(real, "pictures", lambda *_: [()] * 12)
    for more, said in ((), "is of 9 pictures"), (("--every", "0"), "take 1 or more"):
        with pytest.raises(SystemExit):
            real.main(["--wheels", str(tmp_path), "--out", str(out), "--threads", "1", *more])
        assert said in capsys.readouterr().err.splitlines()[-1]


def test_every_setting_is_measured_once():
    asked = [real._key("clip-vit-b-16", one) for one in real.settings(196, 12)]
    assert len(asked) == len(set(asked)) and {one[3] for one in asked} == {"every", "3", "4", "6", "picture"}


@pytest.mark.parametrize("method", (*real.FEW, *real.OTHERS))
def test_methods_are_measured_twice_where_choices_make_a_difference(method):
    row, found = BY_MODEL["CLIPVisionModelWithProjection"], []
    model, x = row.build(), pixels(0)
    for how in real.HOW.values():
        with attach(model, method, ratio=0.9, **how):
            found.append(row.call(model, x)["image_embeds"])
    assert torch.equal(*found) == (method in real.SAME)


def test_the_table_names_every_setting_and_the_plot_is_drawn(tmp_path):
    about = {
        "pictures": 9,
        "device": "a processor",
        "torch": "2",
        "transformers": "5",
        "commit": "abc",
        "date": "today",
    }
    plain = dict(model="clip-vit-b-16", method="none", how="", points="", tokens="196", gflops="35.13", category="0.9")
    plain |= dict(category_low="0.8", category_high="1")
    rows = [plain | about]
    for points, tokens, cosine in (("every", 110, 0.99), ("every", 59, 0.98), ("6", 59, 0.99), ("picture", 64, 0.9)):
        row = dict(method="pitome", how="library", points=points, tokens=str(tokens), gflops="20", cosine=str(cosine))
        row |= {"cosine_low": "0.97", "cosine_high": "0.995", "neighbour": "0.75", "category": ""}
        rows.append(plain | row | about)
    text = report.text(rows)
    assert (
        "own kind 90 (80 to 100)" in text
        and "| pitome | library | 6 | - | 0.9900 (0.970 to 0.995), 75, -, 20 |" in text
    )
    report.plot(rows[:2], tmp_path / "x.png")
    assert "encoders.png" in text and not (tmp_path / "x.png").exists(), "one point is no line"
    report.plot(rows, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000
