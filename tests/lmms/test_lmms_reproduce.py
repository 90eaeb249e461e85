"""Tables run through lmms-eval, on the embedded tasks and with the real prompts and metrics of published ones."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import evaluating
import local_tasks
import pytest
from checks import command_line
from datasets import Dataset
from evaluating import ROOT, answers, by_hand, evaluate
from lmms_eval.tasks import __file__ as packaged
from lmms_eval.tasks.mmbench import en_utils
from packed import PACKED
from PIL import Image

from pitome_mllm.serving.resolution import CONTROL
from pitome_mllm_eval.lmms import reproduce
from pitome_mllm_eval.lmms.model import PitomeLlava
from pitome_mllm_eval.lmms.plans import narrowed
from pitome_mllm_eval.lmms.reproduce import note_hits
from pitome_mllm_eval.lmms.results import interval
from pitome_mllm_eval.lmms.tables import TABLES, TASKS

SHORT = "\nAnswer the question using a single word or phrase."
PACKAGED = packaged.removesuffix("__init__.py")
# Task: where lmms-eval keeps it, the split, the metrics, and how a question ends.
REAL = {
    "gqa": ("gqa/gqa.yaml", "testdev", {"exact_match"}, SHORT),
    "textvqa_val": ("textvqa/textvqa_val.yaml", "validation", {"exact_match"}, SHORT),
    "pope": ("pope/pope.yaml", "test", {"pope_accuracy", "pope_f1_score"}, SHORT),
    "mme": ("mme/mme.yaml", "test", {"mme_perception_score"}, SHORT),
    "scienceqa_img": (
        "scienceqa/scienceqa_img.yaml",
        "test",
        {"exact_match"},
        "\nA. yes\nB. no\nAnswer with the option's letter from the given choices directly.",
    ),
    "mmbench_en_dev_static": (
        "mmbench/mmbench_en_dev_static.yaml",
        "dev",
        {"gpt_eval_score"},
        "\nAnswer with the option's letter from the given choices directly.",
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    local_tasks.write(folder, scenes=4)
    return folder


@pytest.fixture(scope="module")
def tasks(data, tmp_path_factory):
    """lmms-eval's own tasks, included, over local data."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, (path, split, _, _) in REAL.items():
        (folder / f"{name}.yaml").write_text(
            f"include: {PACKAGED}{path}\ntask: local_{name}\ndataset_path: parquet\ndataset_name: null\n"
            f"dataset_kwargs: {{data_files: {{{split}: {data}/{name}.parquet}}}}\nprocess_docs: null\n"
        )
    return folder


@pytest.mark.parametrize("name", REAL)
def test_real_prompts_and_metrics_run_over_local_data(name, tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # TextVQA writes its submission here
    lm = PitomeLlava("tiny", method="tome", keep=72, published=True, batch_size=2)
    found = evaluate(lm, [f"local_{name}"], include=tasks, limit=4, batch_size=2)
    samples = found["samples"][f"local_{name}"]
    _, _, metrics, ending = REAL[name]
    assert metrics <= {key.split(",")[0] for key in found["results"][f"local_{name}"]}
    assert len(samples) == 4 and all(one["arguments"][0].endswith(ending) for one in samples)
    rows = list(local_tasks.MAKERS[name](4))[:4]
    for one, row in zip(samples, rows, strict=True):
        pictures = [] if row["image"] is None else [picture(row["image"])]
        said = by_hand(pictures, one["arguments"][0], new_tokens=16, method="tome", keep=72, published=True)
        assert one["filtered_resps"][0] == said
    assert set(answers(found).values()) != {""}


def picture(number: int) -> Image.Image:
    return local_tasks.scene(number)[0]


def run(capsys, *arguments):
    return command_line(capsys, "reproduce", *arguments)


EMBEDDED = ("--table", "embedded", "--limit", 2, "--method", "tome", "--keep", 72)


def test_the_embedded_table_runs_and_is_not_run_again(capsys, tmp_path, monkeypatch):
    code, out, err = run(capsys, *EMBEDDED, "--out", tmp_path, "--json")
    assert code == 0, err
    rows = {(row["method"], row["task"]): row for row in json.loads(out) if row["as_published"] or not row["amount"]}
    row = rows["tome", "pitome_scenes"]
    assert (
        row["questions"] == 14
        and row["tokens"] == row["published_tokens"] == 72
        and row["low"] <= row["ours"] <= row["high"]
    )
    assert row["difference"] == pytest.approx(row["ours"] - row["published"]) and "accuracy.csv" in row["source"]
    share = 100 * row["ours"] / rows["none", "pitome_scenes"]["ours"]
    shared = rows["tome", "relative"]
    assert shared["ours"] == pytest.approx(share) and shared["low"] <= shared["ours"] <= shared["high"]
    for file in tmp_path.rglob("*_results.json"):
        content = json.loads(file.read_text())
        cost = content["config"]["batch_sizes"][0]["cost"]
        tower = cost["tower_ms"] * cost["questions_asked"] / 1000
        assert tower < float(content["total_evaluation_time_seconds"]) < 600, "the time is of asking, not of writing"
    monkeypatch.setattr(PitomeLlava, "_generate", None)  # asking would fail
    again = run(capsys, *EMBEDDED, "--out", tmp_path, "--json")
    assert (again[0], again[1]) == (0, out) and err.count("is there already") == 0
    assert again[2].count("is there already") == 3


def test_group_a_is_read_from_the_logs_of_three_runs(capsys, tmp_path):
    """With the control of the same count, which the table has not itself."""
    code, out, err = run(capsys, *EMBEDDED, "--limit", 6, "--out", tmp_path, "--group-a", "--json")
    assert code == 0, err
    found = {(row["run"], row["task"]): row for row in json.loads(out)}
    right = {}
    for file in tmp_path.rglob("*_samples_*.jsonl"):
        name = file.relative_to(tmp_path / "embedded").parts[0].rsplit("-", 1)[0]
        for line in file.read_text().splitlines():
            right.setdefault(name, {})[file.name.split("_samples_")[1], json.loads(line)["doc_id"]] = json.loads(line)
    plain, coarse, ours = (
        {key for key, row in right[name].items() if row["exact_match"]}
        for name in ("tiny-none", "tiny-downsample-published-keep=72", "tiny-tome-published-keep=72")
    )
    row = found["tiny tome, published keep=72", "pitome_scenes, group A"]
    assert row["questions"] == len(plain - coarse) > 0 and row["published"] is None
    assert row["ours"] == pytest.approx(100 * len((plain - coarse) & ours) / len(plain - coarse))
    assert found["tiny downsample, published keep=72", "pitome_scenes, group A"]["ours"] == 0


def test_a_smaller_picture_is_a_run_of_its_own_where_pictures_keep_their_size(tmp_path, monkeypatch):
    family = next(family for family in PACKED if family.title == "Qwen2.5-VL")
    family.config().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(reproduce, "load", lambda *args, **kwargs: (family.build(), family.chat()))
    table = narrowed(TABLES["embedded"], str(tmp_path / "model"), ["tome"], [36])
    assert [run.method for run in table.runs] == ["none", CONTROL, "tome"]
    options = reproduce.Options(limit=2, batch_size=4, out=tmp_path / "out")
    found = reproduce.reproduce("embedded", table, options, [].append)
    costs = [results.about["cost"] for results in found.values()]
    assert [cost["visual_tokens"] for cost in costs] == [64, 36, 36], "of the square pictures of the benchmark"
    rows = list(reproduce.compare("embedded", table, found, with_group_a=True))
    assert {(row.run.method, row.task) for row in rows} >= {(CONTROL, "pitome_scenes"), ("tome", "pitome_scenes")}
    assert any(row.run.method == "tome" and row.task.endswith("group A") for row in rows)


def test_a_run_that_was_killed_while_it_wrote_its_results_goes_on(capsys, tmp_path, monkeypatch):
    code, out, _ = run(capsys, *EMBEDDED, "--out", tmp_path, "--json")
    for done in list(tmp_path.rglob("results")):
        written = done.rename(done.with_name("writing"))
        (file,) = written.rglob("*_results.json")
        file.write_text(file.read_text()[:100])
    monkeypatch.setattr(PitomeLlava, "_generate", None)  # asking would fail
    again = run(capsys, *EMBEDDED, "--out", tmp_path, "--json")
    assert again[:2] == (0, out) and not list(tmp_path.rglob("writing"))


# The command, which writes a line into a file for each question that it asks the model.
NOTING = """
import sys, time
from pitome_mllm import cli
from pitome_mllm_eval.lmms.model import PitomeLlava
plain = PitomeLlava._generate
def answer(self, asked):
    found = plain(self, asked)
    with open(sys.argv[1], "a") as file:
        file.write("asked\\n" * len(asked))
    time.sleep(0.05)
    return found
PitomeLlava._generate = answer
sys.exit(cli.main(sys.argv[2:]))
"""
SMALL = (
    "reproduce",
    "--table",
    "embedded",
    "--limit",
    3,
    "--method",
    "tome",
    "--keep",
    72,
    "--batch-size",
    1,
    "--json",
)


def lines(file):
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_a_killed_run_goes_on_without_asking_again(capsys, tmp_path):
    out, first, second = tmp_path / "out", tmp_path / "first", tmp_path / "second"
    command = [sys.executable, "-c", NOTING, first, *SMALL, "--out", out]
    with subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        while lines(first) < 21 + 5 and running.poll() is None:  # the plain run is done, the others are not
            time.sleep(0.02)
        running.kill()
    assert running.returncode == -signal.SIGKILL
    stored = 0
    for database in out.rglob("rank_0.db"):
        with sqlite3.connect(database) as answers_of:
            stored += answers_of.execute("SELECT COUNT(*) FROM responses").fetchone()[0]
    assert 21 + 4 <= stored <= lines(first) < 42, "at most the question that was being asked is lost"
    done = evaluating.run("-c", NOTING, second, *SMALL, "--out", out)
    assert done.returncode == 0, done.stderr
    assert lines(second) == 63 - stored and done.stderr.count("is there already") == 1
    code, whole, _ = command_line(capsys, *SMALL, "--out", tmp_path / "whole")
    assert code == 0 and json.loads(done.stdout) == json.loads(whole)


def test_two_processes_reproduce_what_one_does(capsys, tmp_path):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "pitome_mllm.cli")
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = evaluating.run(*launch, *SMALL, "--out", tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    code, alone, _ = command_line(capsys, *SMALL, "--out", tmp_path)
    assert code == 0 and json.loads(done.stdout) == json.loads(alone)
    assert done.stderr.count("[1/3] tiny none") == 1, "only the first process speaks"
    abouts = [json.loads(path.read_text())["config"]["batch_sizes"][0] for path in tmp_path.rglob("*_results.json")]
    assert sorted(about["processes"] for about in abouts) == [1, 1, 1, 2, 2, 2], "runs of their own"
    assert {about["cost"]["questions_asked"] for about in abouts} == {21}


def test_every_process_loads_the_model_onto_its_own_device():
    second = SimpleNamespace(num_processes=2, device="cuda:1")
    options = reproduce.Options(load={"bits": None, "dtype": "float16", "device": "cuda"})
    assert reproduce._load_options(options, second) == {"bits": None, "dtype": "float16", "device": "cuda:1"}
    with pytest.raises(ValueError, match="device_map=auto spreads one model over all GPUs; start a single process"):
        reproduce._load_options(reproduce.Options(load={"device": "auto"}), second)


def test_a_question_that_fails_is_code_1_and_goes_on_where_it_was(capsys, tmp_path, monkeypatch):
    plain, seen = PitomeLlava._generate, []

    def answer(self, asked):
        seen.extend([1] if self.settings else [])
        if len(seen) == 3:
            raise ArithmeticError("no more")
        return plain(self, asked)

    monkeypatch.setattr(PitomeLlava, "_generate", answer)
    options = (*EMBEDDED, "--out", tmp_path, "--batch-size", 1)
    code, out, err = run(capsys, *options)
    assert (code, out) == (1, "")
    assert "pitome-mllm: task pitome_scenes_colour, document 0: ArithmeticError: no more" in err
    assert len(list(tmp_path.rglob("*_results.json"))) == 1, "of the plain run before it"
    seen.clear()
    seen.extend([1] * 100)
    code, out, _ = run(capsys, *options, "--json")
    assert code == 0 and len(seen) - 100 == 2 * 14 - 2, "two questions had their answers already"
    file = next(path for path in tmp_path.rglob("*_results.json") if "tome-keep" in str(path))
    (about,) = json.loads(file.read_text())["config"]["batch_sizes"]
    assert about["cost"]["questions_asked"] == 12


def test_a_table_with_changed_settings_runs_over_local_data(data, tmp_path, capsys):
    names = ["mme", "pope", "textvqa_ocr", "mmbench"]
    table = narrowed(TABLES["pruning-literature"], "tiny", ["tome"], [64], names)
    options = reproduce.Options(limit=None, batch_size=4, data=data, out=tmp_path)
    said = []
    found = reproduce.reproduce("pruning-literature", table, options, said.append)
    rows = list(reproduce.compare("pruning-literature", table, found))
    assert said == ["[1/2] tiny none", "[2/2] tiny tome, published keep=64"]
    assert [row.task for row in rows] == names * 2, "nothing is kept of MMBench, which the embedded model gets wrong"
    for row in rows[:8]:
        assert row.questions > 0 and row.low is not None
        assert row.ours == TASKS[row.task].scale * found[row.run].figures(TASKS[row.task].task)[TASKS[row.task].metric]
    configs = found[table.runs[1]].content["configs"]
    assert configs["textvqa_val"]["lmms_eval_specific_kwargs"]["ocr"] is True
    asked = [row["input"] for row in found[table.runs[1]].samples("textvqa_val")]
    assert asked and all("\nReference OCR token: " in text and text.endswith(SHORT) for text in asked)
    assert capsys.readouterr().out == "", "what metrics print does not get in between"


def test_mmbench_counts_a_question_that_is_right_in_all_rotations():
    rows = [one for one in local_tasks.mmbench(8) if one.pop("image") is not None]
    wrong = {rows[2]["index"], rows[5]["index"]}  # a question, and the rotation of another
    said = {
        one["index"]: {"A": "B", "B": "A"}[one["answer"]] if one["index"] in wrong else one["answer"] for one in rows
    }
    results = [en_utils.mmbench_process_results(one, [f"{said[one['index']]}."]) for one in rows]
    logged = [{"doc_id": number} | one for number, one in enumerate(results)]
    note_hits(logged)
    overall, *_ = en_utils.mmbench_evaluator.eval_result([one["gpt_eval_score"] for one in logged], "static")
    value, low, high = interval(logged, "gpt_eval_score")
    questions = len(rows) // 2
    assert value == pytest.approx(100 * overall) == pytest.approx(100 * (questions - 2) / questions)
    assert low < value < high and sum("hit" in one for one in logged) == questions


def test_a_task_of_which_no_question_counts_has_no_figure(tmp_path):
    rows = [row | {"image": local_tasks._png(row["image"]), "category": "code_reasoning"} for row in local_tasks.mme(4)]
    data = tmp_path / "data"
    data.mkdir()
    Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(data / "mme.parquet")
    table = narrowed(TABLES["pruning-literature"], "tiny", ["tome"], [64], ["mme"])
    found = reproduce.reproduce("cut", table, reproduce.Options(limit=2, data=data, out=tmp_path), [].append)
    shown = [(row.task, row.ours, row.questions) for row in reproduce.compare("pruning-literature", table, found)]
    assert shown == [("mme", None, 2)] * 2, "only cognition was asked, and perception is published"


def test_data_that_cannot_be_fetched_and_folders_that_cannot_be_written_are_one_line(capsys, tmp_path):
    narrow = ("--model", "tiny", "--method", "tome", "--limit", 2)
    code, out, err = run(capsys, "--table", "pitome-paper", *narrow, "--task", "gqa", "--out", tmp_path)
    assert (code, out) == (1, "") and "pitome-mllm: lmms-eval could not get a task's data: ConnectionError" in err
    (tmp_path / "file").write_text("")
    code, out, err = run(capsys, *EMBEDDED, "--out", tmp_path / "file")
    assert (code, out) == (1, "") and err.splitlines()[-1].startswith("pitome-mllm: [Errno")


def test_text_vqa_has_no_hint_in_the_paper_s_table(data):
    assert reproduce.task_of("textvqa_val", None) == "textvqa_val"
    default = Path(f"{PACKAGED}textvqa/_default_template_textvqa_yaml").read_text()
    assert "ocr: false" in default and reproduce.task_of("textvqa_ocr", None)["lmms_eval_specific_kwargs"]


def test_missing_data_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"no data .*gqa.parquet'; put it there, or choose other tasks than gqa with --task"
    ):
        reproduce.task_of("gqa", tmp_path)
