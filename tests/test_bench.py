"""The benchmark of speed: the timing loop, what is compared, its rows, and the command from a bare checkout."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from models import build
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import is_flash_attn_2_available

from pitome_mllm import METHODS, attach, cli, estimate
from pitome_mllm.families.features import tower_features
from pitome_mllm_eval import clocks, documents, provenance
from pitome_mllm_eval.speed import contenders, gpu, measure, phases, promises, rows, stages

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def test_what_is_compared_takes_turns_and_warms_up():
    seen = []
    calls = {name: clocks.Call(lambda name=name: seen.append(name), times=2) for name in "ab"}
    taken = clocks.in_turns(calls, CPU, repeats=2, warmup=1)
    rounds = ["".join(seen[at : at + 2]) for at in (0, 2, 4)]
    assert set(rounds) == {"ab", "ba"}  # and not always in one order
    assert {name: len(times) for name, times in taken.items()} == {"a": 2, "b": 2}


def test_preparing_is_not_timed_and_a_call_is_divided_by_what_it_does(monkeypatch):
    now = iter((1.0, 1.5))
    monkeypatch.setattr(clocks.time, "thread_time", lambda: next(now))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    order = []
    call = clocks.Call(lambda: order.append("run"), lambda: order.append("prepare"), times=5)
    assert clocks.milliseconds(call, CPU) == pytest.approx(100) and order == ["prepare", "run"]


def test_several_threads_are_timed_by_the_wall_clock(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert clocks.clock_name(CPU) == "wall"


@pytest.fixture(scope="module")
def field():
    """The plain model, four others and their oracles, on a random model."""
    with torch.inference_mode():
        return list(
            contenders.contenders(build(), ["tome", "pitome", "tome:weights", "visionzip", "oracle"], [{"keep": 144}])
        )


def test_weights_are_shared_and_modules_are_not(field):
    plain, other = field[0].model, field[1].model
    assert plain is not other and [p.data_ptr() for p in plain.parameters()] == [
        p.data_ptr() for p in other.parameters()
    ]
    assert not hasattr(plain, "_pitome") and hasattr(other, "_pitome")


def test_there_is_one_oracle_for_every_way_down(field):
    oracles = [c for c in field if c.is_oracle]
    assert [c.like for c in oracles] == ["tome pitome", "visionzip"]  # these two go the same way
    for oracle in oracles:
        made = next(c for c in field if c.method in oracle.like.split())
        same = ("input_patches", "counts", "projector_counts", "place")
        assert all(getattr(oracle.plan, name) == getattr(made.plan, name) for name in same)
        assert oracle.llm is field[0].model


@pytest.mark.parametrize("method", [name for name in METHODS if name != "downsample"])
def test_every_method_has_an_oracle(method, plain):
    *_, oracle = contenders.contenders(plain, [method, "oracle"], [{"keep": 144}])
    assert oracle.is_oracle and oracle.plan.keep == 144


def load(batch: int = 2) -> stages.Load:
    return stages.Load(batch, 1, 8, 3, None)


@torch.inference_mode()
def test_every_contender_gives_the_llm_as_many_tokens_as_planned(field):
    for contender in field:
        made = stages.Stages(contender, load())
        assert made.features().shape[:2] == (2, 144 if contender.plan else 576)
        assert made.cache.get_seq_length() == (144 if contender.plan else 576) + 8
    assert field[3].model.model.vision_tower.config._attn_implementation == "eager"


@torch.inference_mode()
def test_slicing_decides_nothing_and_keeps_the_first_tokens():
    merge = contenders.Slice(attach(build(), "tome", keep=288).plan.reducer).match(torch.rand(1, 9, 4), 3)
    x = torch.rand(1, 9, 2)
    assert torch.equal(merge.reduce(x)[0], x[:, :6])


@torch.inference_mode()
def test_rows_hold_times_ratios_flops_and_cache(field):
    rows = list(measure.measure(field[:3], load(1), ["tower", "merge", "yardstick", "llm", "decode"], "eager", 2, 0))
    found = {(row.stage, row.method): row for row in rows}
    assert found["tower", "plain"].ratio == 1 and ("merge", "plain") not in found
    assert found["merge", "tome"].against == "own tower" and 0 < found["merge", "tome"].ratio < 1
    assert ("yardstick", "tome") not in found and found["yardstick", "pitome"].ms > 0
    assert found["decode", "tome"].kv_bytes / (144 + 8) == found["decode", "plain"].kv_bytes / (576 + 8)
    assert 0 < found["tower", "tome"].gflops < found["tower", "plain"].gflops
    counted = estimate(field[0].model).tower_flops / 1e9
    assert found["tower", "plain"].gflops == pytest.approx(counted, abs=1e-3)
    assert found["llm", "tome"].peak_bytes < found["llm", "plain"].peak_bytes
    assert all(row.p20 <= row.ms <= row.p80 and row.peak_bytes > 0 for row in rows)


class Operations(TorchDispatchMode):
    """Notes what runs, with the shapes of what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.Size | None]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen.append((str(function), getattr(result, "shape", None)))
        return result


@torch.inference_mode()
def test_decoding_runs_the_operations_of_a_plain_model(field):
    """With as many tokens in the cache, as an oracle's LLM has them: not one more, so only the hooks are left."""
    ran = []
    for made in field[:3] + [next(c for c in field if c.is_oracle)]:
        call = stages.Stages(made, load(1)).call("decode")
        with Operations() as operations:
            call.run()
        ran.append(operations.seen)
    plain, tome, pitome, oracle = ran
    assert tome == pitome == oracle and len(plain) == len(pitome)


def test_a_bare_checkout_runs_it(tmp_path):
    """Nothing of ours is installed there: the finder of the editable installation is taken out."""
    out = tmp_path / "bench.csv"
    arguments = f"--stages tower merge --methods tome oracle --repeats 1 --warmup 1 --out {out}".split()
    code = (
        "import sys, runpy\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        f"sys.argv = ['eval/bench.py', *{arguments}]\n"
        "sys.path.insert(0, 'eval')\n"
        "runpy.run_path('eval/bench.py', run_name='__main__')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["stage"], row["method"]) for row in rows} == {
        ("tower", "plain"), ("tower", "tome"), ("tower", "oracle"), ("merge", "tome")
    }  # fmt: skip
    assert all(row["device"] and row["torch"] and row["date"] and row["clock"] == "thread" for row in rows)


def test_rows_of_other_columns_are_not_mixed(tmp_path):
    out = tmp_path / "bench.csv"
    out.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        documents.append(out, [rows.Row(*[0] * 20)], {})


@pytest.mark.parametrize("commit", ["abc-dirty", ""])
def test_published_results_take_clean_commits_only(commit, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="commit first"):
        provenance.check_commit(rows.RESULTS, commit)
    provenance.check_commit(rows.RESULTS, "abc")
    provenance.check_commit(tmp_path / "bench.csv", commit)
    monkeypatch.setattr(provenance, "commit", lambda: commit)
    monkeypatch.setattr(measure, "_model", lambda *_: pytest.fail("measured before it was refused"))
    assert cli.main(["bench", "--out", str(rows.RESULTS)]) == 2


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


@torch.inference_mode()
def test_the_peak_of_each_contender_is_taken_while_no_other_is_alive(field, monkeypatch):
    alive, most = weakref.WeakSet(), []

    class Watched(stages.Stages):
        def __init__(self, *given):
            super().__init__(*given)
            alive.add(self)

    def look(call):
        call.run()
        most.append(len(alive))
        return 7

    monkeypatch.setattr(measure, "Stages", Watched)
    found = measure.once(field[:2], load(1), ["tower", "merge", "decode"], look)
    assert max(most) == 1 and found == dict.fromkeys(
        [("tower", 0), ("decode", 0), ("tower", 1), ("merge", 1), ("decode", 1)], 7
    )


@torch.inference_mode()
def test_what_is_captured_is_the_stage_itself(monkeypatch):
    """All stages but those of transformers' own loops, those of the plain model and of oracles too."""
    capturing = []
    monkeypatch.setattr(stages, "captured", lambda run, device: capturing.append(run) or run)
    field = list(contenders.contenders(build(layers=2), ["pitome", "oracle"], [{"keep": 400}]))
    assert all(made.plan is None or made.plan.graph is False for made in field)
    wanted = [stage for stage in stages.STAGES if stage not in stages.EAGER]
    for made in field:
        captured, eager = (stages.Stages(made, load(1), mode) for mode in ("graph", "eager"))
        for stage in wanted:
            calls = [each.call(stage) for each in (captured, eager)]
            assert (calls[0] is None) == (calls[1] is None)
            if calls[0] is not None:
                torch.testing.assert_close(calls[0].run(), calls[1].run(), rtol=0, atol=0)
    assert len(capturing) == 4 + 6 + 4


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
        (["--methods", "tome:fast"], "tome:weights"),
        (["--mode", "graph"], "needs a CUDA device"),
        (["--mode", "fast"], "unknown mode"),
        (["--stages", "towr"], "did you mean 'tower'"),
        (["--shape", "clip-l", "--stages", "llm"], "possible here are 'preprocess'"),
        (["--layers", "2"], "name one"),
        (["--repeats", "0"], "--repeats 0 is not possible"),
        (["--warmup", "0"], "--warmup 0 is not possible"),
        (["--batch", "0"], "--batch 0"),
        (["--device", "chip"], "--device chip is not possible; choose cpu"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, capsys):
    assert cli.main(["bench", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash attention is installed")
def test_attention_that_is_not_installed_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(measure, "random_model", lambda *_: build(layers=2))
    assert cli.main("bench --shape llava-1.5-7b --attention flash_attention_2".split()) == 2
    said = capsys.readouterr().err
    assert "--attention flash_attention_2 is not installed" in said and said.count("\n") == 1


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ["clip-l-336", "vit-mae-h"])
def test_shapes_merge_in_half_precision(shape, dtype):
    """Three blocks of real width. By what it compares a method may see near-ties otherwise; by position it cannot."""
    config = contenders.configuration(contenders.find_shape(shape), None, True)
    config.vision_config.num_hidden_layers = 3
    torch.manual_seed(0)
    model, side = contenders.random_model(config, torch.float32, CPU), config.vision_config.image_size
    blocks = torch.nn.functional.interpolate(torch.randn(1, 3, 12, 12), side)  # something alike to merge along
    pixels = blocks + 0.3 * torch.randn(1, 3, side, side)
    expected = {}
    for kind in (torch.float32, dtype):
        model.to(kind)
        for method, keep in {"pool": 64, "pitome": 200}.items():
            with attach(model, method, keep=keep) as handle:
                features = tower_features(model, pixels)
                sizes = handle.stats.sizes
            assert features.dtype == kind and features.isfinite().all()
            assert sizes.dtype == torch.float32 and sizes.sum() == handle.plan.available
            groups = handle.stats.groups[..., None].expand(-1, -1, features.shape[-1])
            patches = features[:, -keep:].float().gather(1, groups)
            like = torch.cosine_similarity(patches, expected.setdefault(method, patches), dim=-1)
            assert like.min() > 0.999 if method == "pool" else like.mean() > 0.9


def test_shapes_go_by_the_beginning_of_their_names():
    config = contenders.configuration(contenders.find_shape("clip-l"), None, False)
    assert config.vision_feature_layer == -1 and config.text_config.num_hidden_layers == 0
    config = contenders.configuration(contenders.find_shape("llava-1.5-7b"), 2, False)
    assert config.text_config.num_hidden_layers == 2 and config.image_seq_length == 576


# ---- what is promised on a GPU ---------------------------------------------------------------------------------------


def test_points_remove_equal_shares_and_end_where_they_should():
    made = phases.counts((1, 4, 7, 10, 13, 16), 576, 192, 23)
    assert made[0] == 576 and made[1] == made[3] == 480 and made[16:] == [192] * 7 and len(made) == 23
    assert sorted(made, reverse=True) == made


def test_a_phase_that_fails_costs_only_its_own_cells(tmp_path, monkeypatch, capsys):
    def fails(bench):
        raise RuntimeError("no such kernel")

    def in_this_process(command, timeout):
        assert 0 < timeout < 480
        try:
            return subprocess.CompletedProcess(command, gpu.main(command[3:]))
        except RuntimeError:
            return subprocess.CompletedProcess(command, 1)

    monkeypatch.setitem(gpu.PHASES, "merge", gpu.Phase(fails, False, 5))
    monkeypatch.setattr(phases, "METHODS", {name: METHODS[name] for name in ("tome", "uniform")})
    for module in (gpu, phases):
        monkeypatch.setattr(module, "commit", lambda: "abc")
    monkeypatch.setattr(gpu.subprocess, "run", in_this_process)
    monkeypatch.setattr(phases, "run_tower", lambda model, pixels: torch.zeros(1))
    out = tmp_path / "rows.csv"
    arguments = f"--device cpu --shape tiny --repeats 1 --phases merge bits --out {out}".split()
    assert gpu.main(arguments) == 1
    said = capsys.readouterr().out
    assert "failed: merge" in said and "| bits, graph and eager: tome | 2 | 1 | 1 | yes |" in said
    assert "| merge, captured: keys | 1 | 0.025 | not measured |  |" in said
    assert sum(phase.seconds for phase in gpu.PHASES.values()) < 480


def test_promises_are_judged_by_what_was_measured_last():
    usual = {"phase": "tower", "mode": "captured", "batch": "1"}
    rows_ = [usual | {"what": "5 points", "share": "0.9"}, usual | {"what": "5 points", "share": "0.8"}]
    lines = promises.table([*rows_, usual | {"what": "oracle of 5 points", "share": "0.7"}]).splitlines()
    assert "| tower, captured: 5 points | 1 | 0.86 | 0.8 | yes |" in lines
    assert "| tower, captured: 5 points / oracle of 5 points | 1 | 1.13 | 1.14 | no |" in lines
