"""The embedded benchmark as tasks of lmms-eval: ``python -m pitome_mllm_eval.lmms.scene_tasks`` writes their data.

The parquet files in `eval/tasks/data` hold questions and answers, with the number and the recorded hash of each image.
Images are drawn when they are asked for, and checked against their hash.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from PIL import Image

from ..benchmark.questions import CATEGORIES
from ..benchmark.sets import questions, recorded, scene

TASKS = Path(__file__).parents[1] / "tasks"
GROUP = "pitome_scenes"
SPLIT = "test"


def rows(category: str) -> list[dict[str, Any]]:
    """The questions of one category, in the benchmark's order."""
    return [
        {"scene": number, "sha256": recorded(SPLIT)[number], "question": q.text, "answer": q.answer, "tier": q.tier}
        for number, q in questions(SPLIT)
        if q.category == category
    ]


@functools.lru_cache(maxsize=512)
def _drawn(number: int) -> Image.Image:
    return scene(number, SPLIT)[0]


def picture(document: dict[str, Any]) -> list[Image.Image]:
    """The image of a question; RuntimeError if it, or the task, is not that of this benchmark."""
    number = document["scene"]
    if document["sha256"] != recorded(SPLIT)[number]:
        raise RuntimeError(f"scene {number} of the task is not that of this benchmark; write the tasks' data anew")
    return [_drawn(number)]


if __name__ == "__main__":
    import pyarrow
    from pyarrow import parquet

    (TASKS / "data").mkdir(exist_ok=True)
    for one in CATEGORIES:
        parquet.write_table(pyarrow.Table.from_pylist(rows(one)), TASKS / "data" / f"{one}.parquet")
