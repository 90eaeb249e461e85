"""What must stay cheap: energies in bounded memory, decoding, and what reports say of speed."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from models import CACHE, build
from torch.utils._python_dispatch import TorchDispatchMode

from pitome_mllm import attach, get_method
from pitome_mllm.hooks.call import Call
from pitome_mllm.methods import pitome
from pitome_mllm.methods.pitome import BLOCK
from pitome_mllm_eval import documents
from pitome_mllm_eval.clocks import Alive
from pitome_mllm_eval.speed import report, rows

SHORT = Call({}, torch.zeros(1, 0, dtype=torch.bool))  # a prompt that generate() knows to be short
OPTIONS = [{}, {"energy": "elu"}, {"alpha": 0.0, "protect": 0.5, "steps": 2}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("pairs", [1, 7 * 97 * 2, 96 * 96 * 2])  # a row at a time, several with a rest, all at once
def test_energies_in_blocks_are_those_of_all_at_once(options, pairs):
    metric = torch.randn(2, 97, 8, generator=torch.Generator().manual_seed(3))
    reducer = get_method("pitome", **options)
    with patch.dict(BLOCK, cpu=2**62):
        whole = reducer.match(metric, 20, protected=1, depth=0.4)
    with patch.dict(BLOCK, cpu=pairs):
        blocks = reducer.match(metric, 20, protected=1, depth=0.4)
    torch.testing.assert_close(blocks.steps[0].energy, whole.steps[0].energy, rtol=0, atol=1e-6)
    assert torch.equal(blocks.group, whole.group)


def test_of_two_tokens_in_different_blocks_of_rows_the_similarity_is_worked_out_once():
    unit, seen = torch.eye(5)[None].repeat(2, 80, 1), []

    def value(similarity):
        seen.append(similarity.numel())
        return similarity * 2

    with patch.dict(BLOCK, cpu=40 * 400):
        means = pitome.pair_means(unit, value)
    torch.testing.assert_close(means, (2 * unit @ unit.mT).mean(-1))
    assert sum(seen) < 0.6 * 2 * 400**2


@pytest.mark.parametrize("energy", ["paper", "elu"])
def test_a_similarity_of_exactly_the_margin_counts_as_above_it(energy):
    """f jumps there: half of the pairs are alike to exactly 1/2, which float32 holds."""
    metric = torch.tensor([[[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5]]])
    reducer = get_method("pitome", energy=energy, margin=0.5, alpha=0.0)
    assert reducer.energy_of(metric, 0.0).tolist() == [[{"paper": 0.75, "elu": 0.25}[energy]] * 2]


def test_blocks_bound_memory():
    """A matrix of all pairs is never alive, let alone several."""
    generator = torch.Generator().manual_seed(0)
    keys, x = (torch.randn(1, 1500, width, generator=generator) for width in (64, 1024))

    def peak() -> int:
        with Alive() as alive:
            get_method("pitome").match(keys, 150, depth=0.5).reduce(x)
        return alive.peak

    assert peak() < 2 * x.nbytes + 8e6  # what it gives, and some of what it takes
    with patch.dict(BLOCK, cpu=2**62):
        assert peak() > 2 * 1500**2 * 4


def test_what_counts_memory_sees_tensors_come_and_go():
    with Alive() as alive:
        a = torch.ones(1000)
        b = a + 1
        a.view(10, 100)
        del b
        b = a * 2
    assert (alive.now, alive.peak) == (8000, 8000)
    del a, b
    assert alive.now == 0


@pytest.fixture(scope="module")
def deep():
    """A model with as many tower blocks as CLIP-L."""
    return build(layers=24)


class Operations(TorchDispatchMode):
    """Notes every operation on tensors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def test_attaching_updating_and_removing_touch_no_tensor(deep):
    """So that they take some milliseconds, whatever the model."""
    with Operations() as operations:
        handle = attach(deep, keep=144)
        handle.update(keep=72, method="tome")
        handle.remove()
    assert operations.seen == []


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"method": "pitome", "keep": 144}, {"keep": 144}], ids=str)
def test_a_decoding_step_of_generate_can_be_compiled(one, settings):
    """Within generate(), which knows that its prompt is short; hooks run between its graphs."""
    model = build(layers=3)
    model(**one)
    torch.compiler.reset()
    with attach(model, **settings) as handle:
        out = model(**one, use_cache=True)
        past, token = out[CACHE], out.logits[:, -1:].argmax(-1)
        mask = torch.ones(1, past.get_seq_length() + 1, dtype=torch.long)

        def step(token, past, mask):
            return model(input_ids=token, **{CACHE: past}, attention_mask=mask, use_cache=True).logits

        with handle.choosing(handle.plan, SHORT):
            expected = step(token, past, mask)
            past.crop(-1)
            compiled = torch.compile(step, backend="eager")
            torch.testing.assert_close(compiled(token, past, mask), expected)
    torch.compiler.reset()


def row(**given: str) -> dict[str, str]:
    usual = {
        "model": "LLaVA-1.5-7B",
        "llm_layers": "all",
        "device": "chip",
        "threads": "1",
        "dtype": "float32",
        "mode": "eager",
    }
    usual |= {"attention": "sdpa", "batch": "1", "images": "1", "new_tokens": "8", "commit": "abc", "date": "today"}
    usual |= {"stage": "tower", "method": "plain", "variant": "", "like": "", "keep": "576", "rho": "", "ms": "100"}
    usual |= {"ratio": "1.0", "text_tokens": "40", "repeats": "3", "torch": "2", "clock": "thread", "warmup": "1"}
    usual |= {"transformers": "5", "pitome_mllm": "0", "p20": "90", "p80": "110", "gflops": "10", "peak_bytes": ""}
    return usual | given


def test_the_report_makes_a_table_of_every_run():
    rows = [row(), row(method="tome", keep="144", ms="60", ratio="0.6"), row(method="tome", variant="weights", ms="9")]
    rows += [row(method="oracle", like="tome", keep="144", stage="llm", ms="7.123", ratio="0.3"), row(batch="4")]
    tables = [report.table(run) for run in report.runs(rows)]
    assert len(tables) == 2 and "| plain | 576 | 100 |  |" in tables[0]
    assert "| tome | 144 | 60 (0.600) |  |" in tables[0] and "| oracle of tome | 144 |  | 7.123 (0.300) |" in tables[0]
    assert "tome:weights" in tables[0] and "chip, 1 thread" in tables[0] and "batch 4" in tables[1]


@pytest.mark.parametrize("column", ["text_tokens", "clock", "repeats", "warmup", "torch", "transformers", "commit"])
def test_what_was_measured_otherwise_stands_in_a_table_of_its_own(column):
    assert len(report.runs([row(), row(**{column: "other"})])) == 2


def test_what_was_measured_twice_is_refused():
    with pytest.raises(ValueError, match="measured twice: plain"):
        report.table([row(), row(ms="200")])


def test_a_plot_holds_one_run(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(report, "plot", lambda rows, path, *_: drawn.update({path.name: rows}))
    usual = {"stage": "first token", "method": "tome"}
    rows = [row(**usual, keep="144", model="other")]
    rows += [row(**usual, keep=str(k), batch=str(b)) for k in (72, 144) for b in (1, 2)]
    report.plots(rows, tmp_path)
    assert [(r["model"], r["keep"]) for r in drawn["speed-keep.png"]] == [("LLaVA-1.5-7B", k) for k in ("72", "144")]
    assert [(r["model"], r["batch"]) for r in drawn["speed-batch.png"]] == [("LLaVA-1.5-7B", b) for b in ("1", "2")]


def test_the_published_results_are_of_clean_commits():
    found = documents.read(rows.RESULTS, "")
    assert all(row["commit"] and "dirty" not in row["commit"] for row in found)
    for run in report.runs(found):
        assert report.table(run)  # nothing is there twice


def test_a_legend_covers_no_line_and_names_lines_only(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *_, **__: (figure.draw_without_rendering(), drawn.append(figure))
    )
    rows = [row(method=method, batch=str(b)) for method in ("tome", "pitome") for b in (1, 2)]
    rows += [row(method="pool", batch="1")]
    report.plot(rows, tmp_path / "batch.png", "batch", lambda found: float(found["ms"]), "", "", "")
    (figure,), (axis,) = drawn, drawn[0].axes
    (legend,) = figure.legends
    assert legend.get_window_extent().x0 >= axis.get_window_extent().x1
    assert [text.get_text() for text in legend.get_texts()] == ["tome", "pitome"]


def test_the_report_draws_both_plots(tmp_path):
    rows = [row(stage="first token", method="tome", keep=str(k), batch=str(b)) for k in (72, 144) for b in (1, 2)]
    report.plots(rows, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"speed-keep.png", "speed-batch.png"}
    with pytest.raises(ValueError, match="measure first"):
        documents.read(tmp_path / "none.csv", "bench")
