"""Small data sets with the columns of published ones, out of the embedded scenes.

They let lmms-eval's own prompts and metrics of these tasks run without a network.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pitome_mllm_eval.benchmark.sets import scene
from pitome_mllm_eval.lmms.reproduce import ROTATED

Rows = Iterator[dict[str, Any]]
BINARY = ("existence", "location", "relation")


def _asked(scenes: int, *categories: str) -> Iterator[tuple[int, int, Any]]:
    """Number of the scene, running number, and question."""
    found = ((number, q) for number in range(scenes) for q in scene(number)[1] if q.category in categories)
    for running, (number, question) in enumerate(found):
        yield number, running, question


def gqa(scenes: int) -> Rows:
    for number, running, q in _asked(scenes, "colour", "shape", "existence"):
        yield {"id": str(running), "imageId": str(number), "image": number, "question": q.text, "answer": q.answer}


def textvqa(scenes: int) -> Rows:
    for number, running, q in _asked(scenes, "digit"):
        yield {
            "question_id": running,
            "image_id": str(number),
            "image": number,
            "question": q.text,
            "answers": [q.answer] * 10,
            "ocr_tokens": [q.answer],
        }


def pope(scenes: int) -> Rows:
    for number, running, q in _asked(scenes, "existence"):
        about = {"question_id": str(running), "image_source": str(number), "category": "random"}
        yield about | {"image": number, "question": q.text, "answer": q.answer}


def mme(scenes: int) -> Rows:
    """Two questions on every picture, one of them with yes, as MME has it."""
    for number in range(scenes):
        binary = [q for q in scene(number)[1] if q.category in BINARY]
        pair = [next((q for q in binary if q.answer == answer), None) for answer in ("yes", "no")]
        if all(pair):
            about = {"question_id": f"{number}.png", "category": ("existence", "position")[number % 2]}
            for q in pair:
                ask = f"{q.text} Please answer yes or no."
                yield about | {"image": number, "question": ask, "answer": q.answer.capitalize()}


def scienceqa(scenes: int) -> Rows:
    """Every third question comes without its picture, as many in ScienceQA do."""
    for number, running, q in _asked(scenes, "existence"):
        about = {"hint": "" if running % 2 else "a scene", "question": q.text, "choices": ["yes", "no"]}
        yield about | {"image": None if running % 3 == 2 else number, "answer": ["yes", "no"].index(q.answer)}


def mmbench(scenes: int) -> Rows:
    """Every question twice, the second time with its choices rotated, as MMBench has it."""
    for number, running, q in _asked(scenes, "existence"):
        for turn, choices in enumerate((["yes", "no"], ["no", "yes"])):
            about = {"index": running + turn * ROTATED, "category": q.category, "L2-category": "perception"}
            about |= {"hint": "nan", "source": "scenes", "split": "dev"} | dict(zip("ABCD", [*choices, "nan", "nan"]))
            yield about | {"image": number, "question": q.text, "answer": "AB"[choices.index(q.answer)]}


MAKERS: dict[str, Callable[[int], Rows]] = {
    "gqa": gqa,
    "textvqa_val": textvqa,
    "pope": pope,
    "mme": mme,
    "scienceqa_img": scienceqa,
    "mmbench_en_dev_static": mmbench,
}


def write(folder: Path, scenes: int) -> None:
    """One parquet file for every task in `MAKERS`."""
    from datasets import Dataset, Image

    folder.mkdir(parents=True, exist_ok=True)
    for name, make in MAKERS.items():
        rows = [row | {"image": _png(row["image"])} for row in make(scenes)]
        Dataset.from_list(rows).cast_column("image", Image()).to_parquet(folder / f"{name}.parquet")


def _png(number: int | None) -> dict[str, Any] | None:
    if number is None:
        return None
    file = io.BytesIO()
    scene(number)[0].save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{number}.png"}
