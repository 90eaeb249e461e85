"""Failures are seen, killed runs go on where they were, and two processes score like one."""

import json
import os
import signal
import sqlite3
from collections import Counter

import pytest
from evaluating import COLOUR, COUNT, answers, evaluate, run

from pitome_mllm.methods.tome import ToMe
from pitome_mllm_eval.lmms.results import EvaluationError

MODEL_ARGS = "pretrained=tiny,method=tome,keep=36,published=True"
# A method that breaks at the fifth picture: merging it takes 6 blocks.
BREAKING = """
import sys
from pitome_mllm.methods.tome import ToMe
plain, calls = ToMe.match, []
def match(self, metric, *args, **kwargs):
    calls.extend([1] if metric.any() else [])  # zeros come from the estimate of its cost
    if len(calls) > 4 * 6:
        raise ArithmeticError("no more")
    return plain(self, metric, *args, **kwargs)
ToMe.match = match
"""
COMMAND_LINE = """
import runpy
sys.argv = ["lmms_eval", *sys.argv[1:]]
runpy.run_module("lmms_eval", run_name="__main__")
"""
# Six questions of each task, one at a time; killed before the question whose number is given.
API = """
import json, os, signal, sys
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from pitome_mllm_eval.lmms.model import PitomeLlavaChat
from pitome_mllm_eval.lmms.scene_tasks import TASKS
plain, calls = PitomeLlavaChat._generate, []
def answer(self, asked):
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(asked)
    return plain(self, asked)
PitomeLlavaChat._generate = answer
results = simple_evaluate(
    model="pitome_llava", model_args=sys.argv[3], tasks=sys.argv[4].split(","), limit=6, batch_size=1,
    use_cache=sys.argv[1] if sys.argv[1] != "-" else None, bootstrap_iters=0,
    task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
)
if results is not None:
    samples = {name: [s["filtered_resps"] for s in found] for name, found in results["samples"].items()}
    about = {"asked": len(calls), "results": results["results"], "samples": samples}
    about["cost"] = results["config"]["batch_sizes"][0]["cost"]
    print("FOUND " + json.dumps(about))
"""


def found(done):
    """What the script above says."""
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    return json.loads(line.removeprefix("FOUND "))


def test_a_raising_method_raises_through_the_api(monkeypatch):
    monkeypatch.setattr(ToMe, "match", ToMe.match)  # put back what the next line replaces
    exec(BREAKING, {})
    with pytest.raises(EvaluationError, match=f"^task {COLOUR}, document 4: ArithmeticError: no more$"):
        evaluate("pitome_llava", [COLOUR], model_args=MODEL_ARGS, batch_size=1)


def test_a_raising_method_leaves_no_results_of_the_command_line(tmp_path):
    options = ["--model", "pitome_llava", "--model_args", MODEL_ARGS, "--include_path", "eval/tasks", "--limit", 6]
    options += ["--tasks", COLOUR, "--output_path", tmp_path, "--batch_size", 1, "--device", "cpu", "--log_samples"]
    done = run("-c", BREAKING + COMMAND_LINE, *options)
    assert done.returncode == 0, "lmms-eval exits like this: what tells is that there are no results"
    assert f"Error during evaluation: task {COLOUR}, document 4: ArithmeticError: no more" in done.stdout
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_killed_run_goes_on_without_asking_again(tmp_path):
    tasks = f"{COLOUR},{COUNT}"
    whole = found(run("-c", API, "-", -1, MODEL_ARGS, tasks))
    killed = run("-c", API, tmp_path, 7, MODEL_ARGS, tasks)
    assert killed.returncode == -signal.SIGKILL and "FOUND" not in killed.stdout
    (database,) = tmp_path.rglob("rank_0.db")
    with sqlite3.connect(database) as stored:
        ((kept,),) = stored.execute("SELECT COUNT(*) FROM responses").fetchall()
    assert kept == 7
    again = found(run("-c", API, tmp_path, -1, MODEL_ARGS, tasks))
    assert (whole["asked"], again["asked"]) == (12, 12 - 7)
    assert again["samples"] == whole["samples"] and again["results"] == whole["results"]
    assert again["cost"]["questions_asked"] == 5, "the cost is that of the questions this run asked"
    third = found(run("-c", API, tmp_path, -1, MODEL_ARGS, tasks))
    assert third["asked"] == 0 and third["results"] == whole["results"] and third["cost"] == {}


def test_two_processes_give_the_scores_of_one(tmp_path):
    tasks = [COLOUR, COUNT]
    whole = evaluate("pitome_llava", tasks, model_args=MODEL_ARGS, batch_size=1, limit=7)
    script = tmp_path / "api.py"
    script.write_text(API.replace("limit=6", "limit=7"))
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    done = run(*launch, script, "-", -1, MODEL_ARGS, ",".join(tasks), env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    both = found(done)
    for task in tasks:
        assert both["results"][task]["exact_match,none"] == whole["results"][task]["exact_match,none"]
        given = Counter(text for (name, _), text in answers(whole).items() if name == task)
        assert Counter(text for (text,) in both["samples"][task]) == given
    cost, alone = both["cost"], whole["config"]["batch_sizes"][0]["cost"]
    for name in ("questions_asked", "visual_tokens", "prompt_tokens", "new_tokens", "gflops"):
        assert cost[name] == pytest.approx(alone[name])
