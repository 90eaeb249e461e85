"""`pitome-mllm reproduce` and the report without lmms-eval: tables, plans, intervals, results files."""

import csv
import importlib.util
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from checks import command_line

from pitome_mllm import estimate, load
from pitome_mllm.commands.reproduce import NAMES
from pitome_mllm.costs.published import get_shape
from pitome_mllm.loading import TINY
from pitome_mllm.serving.resolution import CONTROL
from pitome_mllm_eval.lmms import identity, report
from pitome_mllm_eval.lmms.cost import Meter
from pitome_mllm_eval.lmms.plans import BESIDE, SUSTAINED, control, narrowed, plan, with_controls
from pitome_mllm_eval.lmms.results import draws, group_a, interval, read
from pitome_mllm_eval.lmms.tables import FIGURES, PLAIN, RELATIVE, TABLES, TASKS, Run, own_config, published


def run(capsys, *arguments):
    return command_line(capsys, "reproduce", *arguments)


def test_the_command_offers_every_table():
    assert set(NAMES) == set(TABLES)


@pytest.mark.parametrize("name", ["pitome-paper", "pruning-literature", "pitome-imagenet", "pitome-retrieval"])
def test_every_published_figure_belongs_to_a_run_and_names_its_source(name):
    table = TABLES[name]
    for (run, task), row in published(name).items():
        assert (
            run in table.runs
            and task.split()[0] in (*table.tasks, RELATIVE)
            and float(row["value"]) > 0
            and row["source"]
        )
        assert row["tokens"] == ("" if run.ratio else str(run.tokens)), "none where the source does not say how many"
    with FIGURES.open() as file:
        assert {row["table"] for row in csv.DictReader(file)} <= {*TABLES}


def test_derived_means_follow_from_the_figures_beside_them():
    known = {key: float(row["value"]) for key, row in published("pitome-paper").items()}
    for run, task in [key for key in known if key[1] == RELATIVE]:
        share = [known[run, t] / known[Run(run.model), t] for t in TABLES["pitome-paper"].tasks]
        assert 100 * np.mean(share) == pytest.approx(known[run, task], abs=0.06)


def test_the_embedded_table_stands_beside_what_was_measured():
    known = published("embedded")
    assert all((one, "pitome_scenes") in known for one in TABLES["embedded"].runs)


def test_the_embedded_model_is_no_name_for_the_hub(monkeypatch):
    asked, own = [], transformers.AutoConfig.from_pretrained
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda name: asked.append(name) or own(name))
    assert own_config("tiny").model_type == "llava" and asked == [str(TINY)]


def test_protocols_of_next_and_of_shares_are_rows_with_controls():
    tokens = {run.tokens for run in TABLES["llava-next"].runs}
    assert tokens == {2880, 640, 320, 160}
    shares = narrowed(TABLES["shares"])
    by_method = {run.method: {one.tokens for one in shares.runs if one.method == run.method} for run in shares.runs}
    assert by_method["pitome"] == {192, 128, 64, 115, 58, 29} and by_method["downsample"] == {192, 128, 64, 115, 57, 28}
    table = with_controls(TABLES["pitome-paper"])
    assert [run.tokens for run in table.runs if run.method == "downsample"] == [54, 100], "the nearest to 54 and 101"
    assert control(Run("tiny")) == Run("tiny")


def test_the_plan_counts_questions_and_flops(capsys):
    table = TABLES["pitome-paper"]
    first, second, *_ = plan(table, None, tflops=100)
    assert first.documents == sum(TASKS[name].documents for name in table.tasks) == 240_642
    config = get_shape("llava-1.5-7b").config()
    flops = estimate(config, "pitome", ratio=0.9, published=True, text_tokens=60, new_tokens=4).flops
    assert second.gflops == pytest.approx(flops / 1e9)
    assert second.hours == pytest.approx(240_642 * (BESIDE + flops / 1e14) / 3600)
    code, out, err = run(capsys, "--table", "pitome-paper", "--plan", "--limit", 10)
    assert (code, err) == (0, "") and "llava-1.5-13b-hf tofu, published ratio=0.925" in out
    assert "llava-hf/llava-1.5-7b-hf (14.1 GB)" in out and "lmms-lab-encoder/GQA" in out
    assert "vizwiz_vqa_val 4,319" in out and "gqa about 12,578" in out
    code, out, _ = run(capsys, "--table", "pitome-paper", "--plan", "--limit", 10, "--json")
    said = json.loads(out)
    assert said["sizes_about_right"] == ["gqa", "textvqa_val", "mme"]
    assert code == 0 and len(said["runs"]) == len(table.runs) and {r["questions"] for r in said["runs"]} == {60}
    code, out, _ = run(capsys, "--table", "pitome-paper", "--plan", "--data", "here", "--json")
    assert json.loads(out)["downloads"] == [name for name in said["downloads"] if "llava" in name], "data are here"


def test_the_plan_takes_the_hours_that_the_paper_reports_for_vqav2():
    plain, merged = plan(replace(TABLES["pitome-paper"], tasks=("vqav2_val",)), None, SUSTAINED)[:2]
    assert plain.hours == pytest.approx(9 + 5 / 60, rel=0.01)
    assert merged.run.method == "pitome" and merged.hours == pytest.approx(5 + 44 / 60, rel=0.01)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--table", "paper"], "invalid choice: 'paper'"),
        (["--table", "embedded", "--limit", 0, "--plan"], "argument --limit: 0 is not possible"),
        (["--table", "embedded", "--task", "gqa", "--plan"], "no task gqa in this table; choose from pitome_scenes"),
        (
            ["--table", "embedded", "--method", "tome", "tom"],
            "no method tom in this table; choose from none, pitome, tome",
        ),
        (["--table", "embedded", "--keep", 72, 9, "--plan"], "no keep 9 in this table; choose from 36, 72, 144"),
        (["--table", "pitome-paper", "--keep", 72, "--plan"], "no keep 72 in this table; it has no keep at all"),
        (["--table", "pruning-literature", "--method", "dart", "--keep", 94], "no run of the table has one of these"),
        (
            ["--table", "pitome-paper", "--limit", 5, "--plan"],
            "limit=5 is not possible: mme scores 2 questions together",
        ),
        (["--table", "embedded", "--model", "nowhere/", "--plan"], "no folder 'nowhere'"),
    ],
)
def test_mistakes_are_one_line_and_code_2(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_without_lmms_eval_it_says_what_to_install(capsys, tmp_path):
    assert importlib.util.find_spec("lmms_eval") is None, "this suite runs without lmms-eval"
    code, out, err = run(capsys, "--table", "embedded", "--out", tmp_path)
    assert (code, out) == (2, "") and "; in a checkout of pitome-mllm: pip install '.[eval]'" in err


def test_a_table_is_narrowed_to_what_is_asked_for():
    table = narrowed(TABLES["embedded"], str(TINY), ["tome"], [72], None)
    assert [str(one) for one in table.runs] == ["tiny none", "tiny tome keep=72", "tiny tome, published keep=72"]
    assert {one.model for one in table.runs} == {str(TINY)}
    assert [str(one) for one in narrowed(TABLES["embedded"], None, ["none"], None, None).runs] == ["tiny none"]


def test_where_pictures_keep_their_size_a_smaller_picture_is_a_row_of_every_table(tmp_path, capsys):
    transformers.Qwen2_5_VLConfig().save_pretrained(tmp_path)
    model = str(tmp_path)
    table = narrowed(TABLES["shares"], model, ["pitome", "downsample"], [0.222, 0.05])
    rivals = {run.keep: run.tokens for run in table.runs if run.method == CONTROL}
    ours = {run.keep: run.tokens for run in table.runs if run.method == "pitome"}
    assert ours == {0.222: 227, 0.05: 51} and rivals == {0.222: 225, 0.05: 49}
    assert {run.method for run in table.runs} == {PLAIN, "pitome", CONTROL}, (
        "not downsample, which needs a tower's grid"
    )
    assert {run.method for run in with_controls(table).runs} == {PLAIN, "pitome", CONTROL}
    plain, *_, rival = (one.gflops for one in plan(replace(table, runs=(table.runs[0], table.runs[1])), None))
    assert rival < plain / 3
    code, out, err = run(capsys, "--table", "shares", "--model", model, "--method", "pitome", "--plan")
    assert code == 0 and "max_pixels keep=0.05" in out and "tokens of qwen2_5_vl: of a picture that has 1,024" in out, (
        err
    )
    assert "FLOPs and hours of qwen2_5_vl: of the LLM alone" in " ".join(out.split())


def test_intervals_resample_pictures():
    rng = np.random.default_rng(3)
    samples = [{"doc_id": n + 1000, "picture": n // 4, "exact_match": float(rng.random() < 0.7)} for n in range(200)]
    value, low, high = interval(samples, "exact_match")
    assert value == pytest.approx(np.mean([s["exact_match"] for s in samples])) and low < value < high
    together = [{**s, "exact_match": float(s["picture"] % 2)} for s in samples]  # all or nothing on a picture
    alone = [{**s, "picture": None} for s in together]
    widths = [high - low for _, low, high in (interval(which, "exact_match") for which in (together, alone))]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.2)
    assert interval(samples, "gpt_eval_score") is None and interval([], "exact_match") is None


def test_the_first_picture_is_one_like_the_others():
    samples = [{"doc_id": n, "picture": 0, "exact_match": n % 2} for n in range(10)]
    assert interval(samples, "exact_match") == (0.5, 0.5, 0.5), "there is nothing else to draw"


def test_runs_on_the_same_questions_are_resampled_alike():
    right = np.random.default_rng(1).random(100) < 0.6
    plain, ours = ([{"doc_id": n, "exact_match": float(r)} for n, r in enumerate(rows)] for rows in (right, right / 2))
    a, b, other = (draws(rows, "exact_match", seed)[1] for rows, seed in ((plain, 1), (ours, 1), (plain, 2)))
    assert np.allclose(b, a / 2) and not np.allclose(a, other)


def test_rotated_questions_count_once_and_only_where_it_is_known():
    rows = [{"doc_id": n, "gpt_eval_score": {"index": n}} for n in range(8)]
    assert interval(rows, "gpt_eval_score") is None, "of another judge, or of the command line"
    value, low, high = interval([row | {"hit": n % 2} for n, row in enumerate(rows[:4])] + rows[4:], "gpt_eval_score")
    assert value == 50 and low < 50 < high


def test_f1_and_pairs_are_counted_as_their_benchmarks_do():
    pairs = [("yes", "yes"), ("yes", "no"), ("no", "yes"), ("yes", "yes"), ("no", "no")]
    pope = [{"doc_id": n, "pope_f1_score": {"prediction": p, "ground_truth": g}} for n, (p, g) in enumerate(pairs)]
    assert interval(pope, "pope_f1_score")[0] == pytest.approx(2 / 3)
    scores = {("count", "a"): (1, 1), ("count", "b"): (1, 0), ("scene", "c"): (0, 0), ("scene", "d"): (1, 1)}
    mme = [
        {"doc_id": f"{name}{n}", "mme_perception_score": {"category": kind, "question_id": name, "score": score}}
        for (kind, name), both in scores.items()
        for n, score in enumerate(both)
    ]
    value, low, high = interval(mme, "mme_perception_score")
    assert value == (200 + 50) / 2 + (0 + 200) / 2 and low < value < high


def files_of(folder, **contents):
    """A model's folder, as far as its identity goes."""
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def known(monkeypatch, tmp_path):
    """The identity of a run of the embedded table, and what may be told otherwise."""
    monkeypatch.setattr(identity, "version", lambda package: f"{package} 1")

    def one(model="tiny", keep=72, data=None, table=TABLES["embedded"], **how):
        about = identity.model_identity(str(model))
        run = Run(str(model), "tome", keep=keep)
        return identity.short(identity.identity(run, table, data, about, {"limit": 2, "batch_size": 8, **how}))

    return one


def test_a_run_is_known_by_its_model_s_files_not_by_the_name_of_its_folder(known, tmp_path):
    same = {"config.json": "{}", "model.safetensors": "weights"}
    one = files_of(tmp_path / "one" / "model", **same)
    other = files_of(tmp_path / "other" / "model", **{**same, "model.safetensors": "weighty"})
    copy = files_of(tmp_path / "copy" / "model", **same)
    assert known(one) == known(copy) and len({known(one), known(other), known("tiny")}) == 3
    (one / "chat_template.jinja").write_text("another prompt")
    assert known(one) != known(copy)


def test_a_run_is_known_by_all_that_its_results_follow_from(known, tmp_path, monkeypatch):
    table = TABLES["embedded"]
    found = [
        known(), known(keep=36), known(limit=3), known(batch_size=4), known(processes=2), known(bits="4"),
        known(table=replace(table, system_prompt="Be brief.")), known(table=replace(table, tasks=("gqa",))),
    ]  # fmt: skip
    assert known() == found[0] and len(set(found)) == len(found)
    monkeypatch.setattr(identity, "version", lambda package: f"{package} 2")
    assert known() not in found


@pytest.mark.parametrize("changed", ["_scenes", "pitome_scenes.yaml", "data/count.parquet"])
def test_a_run_is_known_by_the_files_of_its_tasks(known, tmp_path, monkeypatch, changed):
    before = known()
    monkeypatch.setattr(identity, "TASKS", shutil.copytree(identity.TASKS, tmp_path / "tasks"))
    assert known() == before
    with (tmp_path / "tasks" / changed).open("ab") as file:
        file.write(b" ")
    assert known() != before


def test_a_run_is_known_by_local_data(known, tmp_path):
    table, data = replace(TABLES["embedded"], tasks=("gqa",)), files_of(tmp_path / "data", **{"gqa.parquet": "rows"})
    before = known(table=table, data=data)
    assert before != known(table=table, data=data, limit=4)
    (data / "gqa.parquet").write_text("more")
    assert len({before, known(table=table, data=data), known(table=table)}) == 3


@pytest.mark.parametrize("devices", [("cpu",), ("cuda:0", "cuda:1", "cpu")])
def test_the_peak_of_memory_is_that_of_the_gpus_since_the_meter_began(devices, monkeypatch):
    peaks = {torch.device(name): 7e6 for name in devices if name != "cpu"}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda gpu: peaks.__setitem__(gpu, 1e6))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peaks.__getitem__)
    config = load("tiny")[0].config
    parts = [SimpleNamespace(device=torch.device(name)) for name in (*devices, *devices)]
    meter = Meter(SimpleNamespace(parameters=lambda: iter(parts), config=config), {})
    meter.sums.update(questions=1, total_ms=2000.0, new=2)
    found = meter.gather(processes=1)
    assert found.get("peak_memory_mb") == (2.0 if peaks else None)


def results(folder, method, keep, scores, milliseconds, peak=None, **conditions):
    """What lmms-eval writes about one run of one task."""
    asked = {"method": method, "keep": keep} if keep else {}
    cost = {
        "questions_asked": len(scores), "visual_tokens": keep or 576.0, "prompt_tokens": 600.0, "tower_ms": 3.0,
        "prefill_ms": milliseconds, "decode_ms": 2.0, "tokens_per_second": 9.0, "gflops": 1.5,
    }  # fmt: skip
    cost |= {"peak_memory_mb": peak} if peak else {}
    versions = dict.fromkeys(("pitome_mllm", "torch", "transformers", "lmms_eval"), "1.0")
    about = {"pretrained": "tiny", "method": method, "asked": asked, "cost": cost, "versions": versions}
    about |= {"batch": 8, "processes": 1, "device": "a processor", "dtype": "torch.float32"}
    about |= {"bits": "", "attention": "sdpa", "system_prompt": ""} | conditions
    content = {
        "results": {"own": {"exact_match,none": float(np.mean(scores)), "exact_match_stderr,none": "N/A"}},
        "group_subtasks": {"own": []},
        "n-samples": {"own": {"effective": len(scores)}},
        "config": {"batch_sizes": [about]},
        "date": f"{folder.name} day",
        "total_evaluation_time_seconds": "18.0",
    }
    folder.mkdir(parents=True)
    (folder / "1_results.json").write_text(json.dumps(content))
    rows = [{"doc_id": n, "picture": n, "exact_match": score} for n, score in enumerate(scores)]
    (folder / "1_samples_own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folders(tmp_path):
    results(tmp_path / "plain", "none", None, [1.0] * 9 + [0.0], 20.0)
    results(tmp_path / "a", "tome", 144, [1.0] * 8 + [0.0] * 2, 12.0)
    results(tmp_path / "b", "tome", 72, [1.0] * 6 + [0.0] * 4, 8.0)
    return tmp_path


def test_the_report_makes_csv_plots_and_the_table(folders, capsys):
    page = folders / "page.md"
    page.write_text(f"before\n{report.MARKS[0]}\nold\n{report.MARKS[1]}\nafter\n")
    report.main([str(folders), "--csv", str(folders / "x.csv"), "--plots", str(folders), "--page", str(page)])
    with (folders / "x.csv").open() as file:
        found = {(row["method"], row["asked"]): row for row in csv.DictReader(file)}
    assert len(found) == 3
    row = found["tome", "keep=144"]
    assert [row[name] for name in ("value", "visual_tokens", "latency_ms", "questions")] == ["0.8", "144", "14.0", "10"]
    assert float(row["low"]) < 0.8 < float(row["high"])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| tiny | tome | keep=72 | own exact_match | 0.600 (" in text
    assert capsys.readouterr().out.strip() in text
    assert "prefill ms" not in text and "FLOPs are calculated." in text
    report.main([str(folders), "--csv", str(folders / "x.csv"), "--plots", str(folders), "--times"])
    line = next(line for line in capsys.readouterr().out.splitlines() if "keep=144" in line)
    assert line.endswith("| 144.0 | 600.0 | 1.50 | 3.0 | 12.0 | 2.0 | 9.0 |"), "no column of peaks, as there are none"
    assert {path.name for path in folders.glob("*.png")} == {"lmms_visual_tokens.png", "lmms_latency_ms.png"}


def test_runs_under_other_conditions_are_lines_of_their_own(folders, capsys):
    results(folders / "half", "tome", 144, [1.0] * 5, 6.0, peak=500.0, batch=1, device="a GPU", bits=4)
    report.main([str(folders), "--csv", str(folders / "x.csv"), "--plots", str(folders)])
    out = capsys.readouterr().out
    heads, *lines = [line for line in out.splitlines() if line.startswith("|")]
    assert heads.startswith("| model | method | asked | questions | device | bits | batch | task |")
    assert heads.endswith("| peak GPU MB |")
    found = sorted(line for line in lines if "| tome | keep=144 |" in line)
    assert [line.split(" | ")[3:7] for line in found] == [["10", "a processor", "", "8"], ["5", "a GPU", "4", "1"]]
    assert [line.split(" | ")[-1] for line in found] == ["- |", "500 |"]


def test_the_report_says_so_where_all_answers_came_from_the_cache(folders, capsys, caplog):
    for file in folders.rglob("*_results.json"):
        content = json.loads(file.read_text())
        content["config"]["batch_sizes"][0]["cost"] = {}
        file.write_text(json.dumps(content))
    report.main([str(folders), "--csv", str(folders / "x.csv"), "--plots", str(folders)])
    assert "| tome | keep=72 | own exact_match | 0.600 (" in capsys.readouterr().out
    assert "no plot over visual tokens per question: no run measured them" in caplog.text


def test_the_report_says_over_what_it_draws_and_that_costs_are_of_all_tasks(folders, capsys):
    for file in folders.rglob("*_results.json"):
        content = json.loads(file.read_text())
        for kind in ("results", "group_subtasks", "n-samples"):
            content[kind]["other"] = content[kind]["own"]
        file.write_text(json.dumps(content))
        samples = file.with_name("1_samples_own.jsonl")
        samples.with_name("1_samples_other.jsonl").write_text(samples.read_text().replace('"picture"', '"unknown"'))
    report.main([str(folders), "--csv", str(folders / "x.csv"), "--plots", str(folders)])
    out = capsys.readouterr().out
    assert "intervals over images, questions. Means per question of all tasks of a run, batches" in out


def test_without_logged_questions_there_is_no_interval_but_their_number(folders, capsys):
    for file in folders.rglob("*.jsonl"):
        file.unlink()
    report.main([str(folders), "--csv", str(folders / "x.csv"), "--plots", str(folders)])
    out = capsys.readouterr().out
    assert "| own exact_match | 0.600 | 72.0" in out and "10 questions per run" in out


def test_a_file_that_was_cut_off_is_named(folders, capsys):
    file = folders / "a" / "1_results.json"
    file.write_text(file.read_text()[:50])
    with pytest.raises(SystemExit):
        report.main([str(folders)])
    assert "a/1_results.json' was cut off while it was written" in capsys.readouterr().err


def test_two_runs_of_one_setting_are_refused(folders, capsys):
    results(folders / "again", "tome", 144, [1.0] * 9 + [0.0], 6.0)
    with pytest.raises(SystemExit):
        report.main([str(folders), "--csv", str(folders / "x.csv"), "--plots", str(folders)])
    err = capsys.readouterr().err
    assert (
        "two runs of tiny tome keep=144 on own under the same conditions, of a day and again day" in err
        and not (folders / "x.csv").exists()
    )


def test_results_that_do_not_follow_from_their_questions_are_refused(folders):
    file = folders / "a" / "1_samples_own.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    (found,) = read([folders / "a"])
    with pytest.raises(RuntimeError, match="exact_match of own is 0.8, but its questions give 0.88"):
        found.figure("own", "exact_match")


def test_questions_come_in_order_whichever_process_asked_them(folders):
    file = folders / "a" / "1_samples_own.jsonl"
    (found,) = read([folders / "a"])
    before = found.samples("own")
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    assert found.samples("own") == before != list(reversed(before))


def test_group_a_is_what_the_plain_model_gets_right_and_downsampling_wrong(folders):
    results(folders / "coarse", "downsample", 72, [1.0] * 2 + [0.0] * 8, 6.0)  # plain: all but the last; b: the first 6
    plain, coarse, run = (next(read([folders / name])) for name in ("plain", "coarse", "b"))
    found = group_a(plain, coarse, run, "own", "exact_match")
    assert (found.questions, found.value) == (7, pytest.approx(100 * 4 / 7)) and found.low < found.value < found.high
    nothing = group_a(coarse, plain, run, "own", "exact_match")
    assert (nothing.questions, nothing.value) == (0, None)


def test_the_report_refuses_what_it_cannot_read(folders, capsys):
    with pytest.raises(SystemExit):
        report.main([str(folders / "nothing")])
    assert "no results (*_results.json)" in capsys.readouterr().err
    file = folders / "a" / "1_results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"config": {"batch_sizes": []}}))
    with pytest.raises(SystemExit):
        report.main([str(folders)])
    assert "was not written by pitome_llava" in capsys.readouterr().err
