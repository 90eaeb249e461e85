"""The benchmark of speed: the clock, what is compared, its rows and tables, and the command from a bare checkout."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from checks import Operations, command_line
from models import build

from pitome_mllm import METHODS, attach, cli
from pitome_mllm.costs import latency
from pitome_mllm.costs.published import get_shape
from pitome_mllm.families.features import tower_features
from pitome_mllm.hooks.caches import cache_of, name_for
from pitome_mllm.hooks.call import Call
from pitome_mllm_eval import documents, provenance
from pitome_mllm_eval.speed import gpu, measure, models, phases, report, sheet
from pitome_mllm_eval.speed.sheet import CPU_RESULTS, Row

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SHORT = Call({}, torch.zeros(1, 0, dtype=torch.bool))  # a prompt that generate() knows to be short


# ---- the clock -------------------------------------------------------------------------------------------------------


def test_what_is_compared_takes_turns_and_warms_up():
    seen = []
    calls = {name: lambda name=name: seen.append(name) or len(seen) for name in "ab"}
    taken = latency.in_turns(calls, repeats=2)
    rounds = ["".join(seen[at : at + 2]) for at in (0, 2, 4)]
    assert set(rounds) == {"ab", "ba"}  # and not always in one order
    assert sorted(taken["a"] + taken["b"]) == [3, 4, 5, 6]  # what the calls gave after the warm-up


@pytest.mark.parametrize("threads, clock", [(1, "thread_time"), (2, "perf_counter")])
def test_one_thread_counts_its_own_time_and_a_call_is_divided_by_what_it_does(threads, clock, monkeypatch):
    ticks = iter((1.0, 1.5))
    monkeypatch.setattr(latency.time, clock, lambda: next(ticks))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert latency.milliseconds(lambda: None, CPU, times=5) == pytest.approx(100)


# ---- pitome-mllm bench -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def field():
    """The plain model, three others and an oracle, on a random model."""
    with torch.inference_mode():
        return list(measure.contenders(build(), ["pitome", "tome:published", "visionzip", "oracle"], [{"keep": 144}]))


def test_weights_are_shared_and_modules_are_not(field):
    plain, other = field[0].model, field[1].model
    addresses = [[p.data_ptr() for p in model.parameters()] for model in (plain, other)]
    assert plain is not other and addresses[0] == addresses[1]
    assert not hasattr(plain, "_pitome") and hasattr(other, "_pitome")


def test_contenders_are_what_their_names_say(field):
    assert [each.name for each in field] == [
        "plain", "pitome, 144", "tome:published, 144", "visionzip, 144", "oracle of pitome, 144"
    ]  # fmt: skip
    pitome, tome, oracle = (field[at].handle.plan for at in (1, 2, 4))
    assert (tome.where, tome.metric) == ("tower", "keys") and pitome.metric == "hidden"
    assert (oracle.counts, oracle.place) == (pitome.counts, pitome.place)


@torch.inference_mode()
def test_slicing_decides_nothing_and_keeps_the_first_tokens():
    x = torch.rand(1, 9, 2)
    assert torch.equal(models.Slice().match(torch.rand(1, 9, 4), 3).reduce(x)[0], x[:, :6])


@torch.inference_mode()
def test_rows_hold_times_and_shares_of_the_same_rounds(field, monkeypatch):
    """On a clock that every block of the tower moves by 1 s, the head of the LLM by 8, and merging by 1/2."""
    passed = [0.0]
    monkeypatch.setattr(latency, "now", lambda *_: passed[0])
    monkeypatch.setattr(measure, "merging", lambda *_: lambda: passed.append(passed.pop() + 0.5))

    def moves(module, seconds):
        module.register_forward_hook(lambda *_: passed.append(passed.pop() + seconds))

    for at, each in enumerate(field):
        moves(each.model.model.vision_tower, 10.0 - at)
        moves(each.model.lm_head, 8.0)
    found = {(row.phase, row.what): row for row in measure.rows(field, 1, 1, 2)}
    tower, first = found["tower", "pitome, 144"], found["first token", "pitome, 144"]
    assert (tower.ms, tower.share, first.ms, first.share) == (9000, 0.9, 17000, round(17 / 18, 4))
    assert found["decode", "pitome, 144"].ms == found["decode", "plain"].ms == 8000
    assert found["merge", "pitome, 144"].share == round(0.5 / 9, 4) and ("merge", "plain") not in found
    assert [phase for phase, what in found if what.startswith("oracle")] == ["tower"]
    assert found["over slicing", "pitome, 144"].share == 1.5  # 9 over 6


@torch.inference_mode()
def test_decoding_runs_the_operations_of_a_plain_model(field):
    """Not one more, so that only the hooks are left."""
    ran = []
    inputs = models.prompt(field[0].model, 1)
    for each in field[:3]:
        made = each.model(**inputs, use_cache=True)
        step = {"input_ids": inputs["input_ids"][:, -1:], name_for(each.model): cache_of(made)}
        with each.handle.choosing(each.handle.plan, SHORT) if each.handle else torch.no_grad():
            with Operations() as operations:
                each.model(**step, use_cache=True)
        ran.append([operation for operation, _ in operations.seen])
    plain, _, published = ran  # calibration, as the default has it, adds a mask
    assert published == plain


def test_a_bare_checkout_runs_it(tmp_path):
    """Nothing of ours is installed there: the finder of the editable installation is taken out."""
    out = tmp_path / "bench.csv"
    arguments = f"--methods tome oracle --repeats 1 --out {out}".split()
    code = (
        "import sys, runpy\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        f"sys.argv = ['eval/bench.py', *{arguments}]\n"
        "sys.path.insert(0, 'eval')\n"
        "runpy.run_path('eval/bench.py', run_name='__main__')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    every = {("tower", "plain"), ("first token", "plain"), ("decode", "plain"), ("tower", "oracle of tome, 144")}
    every |= {(phase, "tome, 144") for phase in ("tower", "over slicing", "merge", "first token", "decode")}
    assert {(row["phase"], row["what"]) for row in rows} == every
    assert all(row["torch"] and row["date"] and "its own time" in row["device"] for row in rows)
    assert "tome, 144" in done.stdout and "…" not in done.stdout and max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize("out, words", [("other.csv", "other columns"), ("none/bench.csv", "there is no folder")])
def test_where_rows_cannot_be_added_is_said_before_anything_is_measured(out, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    monkeypatch.setattr(measure, "_model", lambda *_: pytest.fail("measured before it was refused"))
    assert cli.main(["bench", "--out", str(tmp_path / out)]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "none").exists()


@pytest.mark.parametrize("commit", ["abc-dirty", ""])
def test_published_results_take_clean_commits_only(commit, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="commit first"):
        provenance.check_commit(CPU_RESULTS, commit)
    provenance.check_commit(CPU_RESULTS, "abc")
    provenance.check_commit(tmp_path / "bench.csv", commit)
    monkeypatch.setattr(sheet, "commit", lambda: commit)
    monkeypatch.setattr(measure, "_model", lambda *_: pytest.fail("measured before it was refused"))
    assert cli.main(["bench", "--out", str(CPU_RESULTS)]) == 2


def test_a_checkout_is_dirty_by_its_code_and_not_by_its_results(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e@e", *words], cwd=tmp_path, check=True)

    results, code = tmp_path / "eval" / "results" / "bench.csv", tmp_path / "eval" / "provenance.py"
    results.parent.mkdir(parents=True)
    for path in (results, code):
        path.write_text("1")
    monkeypatch.setattr(provenance, "RESULTS", results.parent)
    monkeypatch.setattr(provenance, "__file__", str(code))
    git("init", "-q")
    git("add", results)
    git("commit", "-qm", "somebody else's")
    assert provenance.commit() == ""  # this commit says nothing about the code
    git("add", code)
    git("commit", "-qm", "first")
    clean = provenance.commit()
    results.write_text("2")
    assert clean and provenance.commit() == clean
    code.write_text("2")
    assert provenance.commit() == f"{clean}-dirty"


@pytest.mark.parametrize("config", ["LlavaNextConfig", "VipLlavaConfig", "VideoLlavaConfig"])
def test_families_whose_pictures_bench_cannot_make_are_refused(config):
    measure.check_family(build().config)
    with pytest.raises(ValueError, match="--shape llava-next-7b"):
        measure.check_family(getattr(transformers, config)())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--shape", "llava"], "unknown shape 'llava'"),
        (["--methods", "tom"], "did you mean 'tome'"),
        (["--methods", "tome:key"], "did you mean 'keys'"),
        (["--methods", "oracle"], "begins with the oracle"),
        (["--methods", "visionzip", "oracle"], "does not merge in the tower"),
        (["--layers", "2"], "name one"),
        (["--shape", "llava-1.5-7b", "--layers", "33"], "choose 0 (the tower alone) to 32"),
        (["--repeats", "0"], "argument --repeats: 0 is not possible"),
        (["--batch", "0"], "argument --batch: 0"),
        (["--device", "chip"], "--device chip is not possible; choose cpu"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, capsys):
    code, _, said = command_line(capsys, "bench", *arguments)
    assert code == 2 and words in said and said.count("\n") == 1


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ["clip-l-336", "vit-mae-h"])
def test_shapes_merge_in_half_precision(shape, dtype):
    """Two blocks of real width. By what it compares a method may see near-ties otherwise; by position it cannot."""
    config = models.configuration(get_shape(shape), 0)
    config.vision_config.num_hidden_layers, config.vision_config.image_size = 2, 168
    torch.manual_seed(0)
    model, side = models.random_model(config, torch.float32, CPU), config.vision_config.image_size
    blocks = torch.nn.functional.interpolate(torch.randn(1, 3, 6, 6), side)  # something alike to merge along
    pixels = blocks + 0.3 * torch.randn(1, 3, side, side)
    expected = {}
    for kind in (torch.float32, dtype):
        model.to(kind)
        for method, keep in {"pool": 36, "pitome": 72}.items():
            with attach(model, method, keep=keep) as handle:
                features = tower_features(model, pixels)
                sizes = handle.stats.sizes
            assert features.dtype == kind and features.isfinite().all()
            assert sizes.dtype == torch.float32 and sizes.sum() == handle.plan.available
            groups = handle.stats.groups[..., None].expand(-1, -1, features.shape[-1])
            patches = features[:, -keep:].float().gather(1, groups)
            like = torch.cosine_similarity(patches, expected.setdefault(method, patches), dim=-1)
            assert like.min() > 0.999 if method == "pool" else like.mean() > 0.9


def test_shapes_have_as_many_llm_blocks_as_asked():
    config = models.configuration(get_shape("clip-l-336"))
    assert config.vision_feature_layer == -1 and config.text_config.num_hidden_layers == 0
    config = models.configuration(get_shape("llava-1.5-7b"), 2)
    assert config.text_config.num_hidden_layers == 2 and config.image_seq_length == 576


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def test_points_remove_equal_shares_and_end_where_they_should():
    made = phases.counts((1, 4, 7, 10, 13, 16), 576, 192, 23)
    assert made[0] == 576 and made[1] == made[3] == 480 and made[16:] == [192] * 7 and len(made) == 23
    assert sorted(made, reverse=True) == made


@pytest.fixture
def bench(tmp_path):
    """What phases get: a small model on a processor, and a sheet of rows."""
    return lambda layers: phases.Bench(
        gpu.parse(f"--device cpu --shape tiny --repeats 1 --out {tmp_path}/r".split()), layers
    )


@torch.inference_mode()
@pytest.mark.parametrize("name", gpu.PHASES)
def test_every_phase_gives_the_rows_that_the_table_asks_for(name, bench, monkeypatch):
    run, layers, _ = gpu.PHASES[name]
    monkeypatch.setattr(phases, "METHODS", {method: METHODS[method] for method in ("pitome", "uniform")})
    for batches in ("BATCHES", "LLM_BATCHES"):
        monkeypatch.setattr(phases, batches, (1,))
    monkeypatch.setattr(
        sheet.Sheet,
        "time",
        lambda self, phase, mode, batch, calls, repeats, times=1: self.add(
            *(Row(phase, what, mode, batch, call() is None) for what, call in calls.items())
        ),
    )
    made = bench(layers)
    run(made)
    keys = {(row.phase, row.what, row.mode, row.batch) for row in made.sheet.rows}
    assert keys >= {key for key in {**report.SHARES, **report.MERGES} if key[0] == name and key[-1] == 1}
    if name in ("tower", "prefill", "first token"):
        assert {(name, "plain", mode, 1) for _, _, mode, _ in keys} <= keys
    if name == "first token":
        assert {(name, f"pitome, {keep}", "graph", 1) for keep in phases.KEEPS} <= keys, "the README's table"
    if name in ("bits", "memory"):
        assert keys and all(row.value != "" for row in made.sheet.rows)


def fails(bench: phases.Bench) -> None:
    raise RuntimeError("no such kernel")


def hangs(bench: phases.Bench) -> None:
    time.sleep(60)


def works(bench: phases.Bench) -> None:
    bench.sheet.add(Row("bits", "tome", "graph and eager", 2, value=1))


def test_a_phase_that_fails_or_hangs_costs_only_its_own_cells(tmp_path, monkeypatch, capfd):
    for name, (run, seconds) in {"tower": (fails, 30), "merge": (hangs, 0.2), "bits": (works, 30)}.items():
        monkeypatch.setitem(gpu.PHASES, name, (run, 0, seconds))
    monkeypatch.setattr(phases, "random_model", lambda *_: None)
    out = tmp_path / "rows.csv"
    arguments = f"--device cpu --shape tiny --phases tower merge bits --out {out}".split()
    assert gpu.main(arguments) == 2
    said = capfd.readouterr()
    assert "failed: tower\nfailed: merge" in said.out and "no such kernel" in said.err
    assert "1 of 1 methods give the same bits" in said.out and "not measured" in said.out


def test_all_phases_end_within_eight_minutes():
    assert sum(seconds for *_, seconds in gpu.PHASES.values()) < 480


# ---- tables ----------------------------------------------------------------------------------------------------------


def row(phase: str, what: str, ms: float, share: float | str = "", mode: str = "eager", batch: int = 1, **given: str):
    usual = {"device": "chip", "dtype": "float32", "shape": "tiny", "torch": "2", "transformers": "5", "commit": "abc"}
    timed = {"phase": phase, "what": what, "mode": mode, "batch": str(batch), "ms": str(ms), "share": str(share)}
    return usual | timed | {"value": "", "date": "today"} | given


def test_what_was_measured_last_on_a_gpu_is_judged_by_what_is_promised():
    made = partial(row, "tower", mode="captured")
    rows = [made("plain", 2), made("5 points", 1.8, 0.9), made("5 points", 1.6, 0.8), made("oracle of 5 points", 1.4)]
    lines = report.gpu_table(rows).splitlines()
    title = "tower, as one graph: 5 merges to 64 tokens, keys"
    assert f"| {title} | 1 | 2 | 1.6 | 0.8 (<= 0.86) | **1.14** (<= 1.13) |" in lines
    assert f"| {title} | 4 |  | not measured |  |  |" in lines


def test_the_processors_table_has_a_line_for_each_contender():
    rows = [row("tower", "plain", 30, 1.0), row("first token", "plain", 60, 1.0), row("tower", "pitome, 144", 33, 1.1)]
    rows += [
        row("merge", "pitome, 144", 3, 0.1),
        row("over slicing", "pitome, 144", 33, 1.1),
        row("decode", "pitome, 144", 1, 1.2),
    ]
    *_, plain, pitome = report.cpu_table(rows).splitlines()
    assert plain == "| embedded model | plain | 30 |  |  |  | 60 |  |  |"
    assert pitome == "| embedded model | pitome, 144 | 33 | **1.1** (<= 1) | 1.1 | 0.1 |  |  | 1.2 |"


@pytest.mark.parametrize("column", ["device", "torch", "commit"])
def test_rows_of_several_runs_are_no_table(column, tmp_path):
    path = tmp_path / "bench.csv"
    rows = [row("tower", "plain", 1), row("tower", "plain", 1, **{column: "other"})]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(ValueError, match=f"rows of several: {column}"):
        report.results(path)


def test_the_published_results_are_of_clean_commits():
    for path in report.COMMANDS:
        assert all(row["commit"] and "dirty" not in row["commit"] for row in documents.read(path, ""))
