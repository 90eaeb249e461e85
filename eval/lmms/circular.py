"""MMBench asks a question again with its choices rotated, and counts it as right only if all answers are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

ROTATED = 1_000_000  # index of a rotated question, less that of the question itself or a multiple


def note_hits(rows: Sequence[dict[str, Any]], metric: str = "gpt_eval_score") -> None:
    """Put into every row of a question, not into those of its rotations, whether it counts as right ("hit").

    Parameters
    ----------
    rows : what lmms-eval logged of each document of its static MMBench, whose own matching of answers decides.
    """
    import pandas
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    asked = pandas.DataFrame([row[metric] for row in rows])
    answers = dict(zip(asked["index"], asked["answer"], strict=True))
    number = asked["index"] % ROTATED
    for row in rows:
        if (index := row[metric]["index"]) < ROTATED:
            together = asked[number == index]
            row["hit"] = float(mmbench_evaluator.eval_sub_data(together, answers, static_only=True))
