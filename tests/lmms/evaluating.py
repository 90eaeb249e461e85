"""What the tests of the plug-in share: lmms-eval's API on the embedded tasks, and the plain way to answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from pitome_mllm import attach, load
from pitome_mllm_eval.lmms.scene_tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
COLOUR, COUNT = "pitome_scenes_colour", "pitome_scenes_count"


def evaluate(model: Any, tasks: list[Any], include: Any = TASKS, **more: Any) -> dict[str, Any]:
    """One evaluation without lmms-eval's own tasks, which take long to list."""
    manager = TaskManager(include_path=str(include), include_defaults=False)
    options = {"bootstrap_iters": 0, "limit": 6, "batch_size": 4, **more}
    return simple_evaluate(model=model, tasks=tasks, task_manager=manager, **options)


def answers(results: dict[str, Any]) -> dict[tuple[str, int], str]:
    """What was answered, by task and document."""
    samples = results["samples"]
    return {(task, one["doc_id"]): one["filtered_resps"][0] for task in samples for one in samples[task]}


def by_hand(pictures: list[Any], text: str, new_tokens: int = 4, bits: int | None = None, **settings: Any) -> str:
    """The answer that `pitome_mllm` gives without lmms-eval, one question at a time."""
    model, processor = load("tiny", bits=bits)
    if settings:
        attach(model, **settings)
    content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=pictures or None, text=prompt, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def request(number: int, context: str, options: dict[str, Any] | str, kind: str = "generate_until") -> Instance:
    """A request about document ``number`` of a task "own", whose documents are lists of pictures."""
    arguments = (context, options, lambda document: document, number, "own", "test")
    about = {"task": "own", "doc_id": number, "repeats": 1}
    return Instance(request_type=kind, arguments=arguments, idx=0, metadata=about)


def run(*command: Any, **more: Any) -> subprocess.CompletedProcess:
    """Another Python process, offline."""
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT, timeout=600, **more
    )
