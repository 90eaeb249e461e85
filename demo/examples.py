"""Pictures to begin with: held-out scenes that the embedded model was made for, and photographs to look into."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from pitome_mllm_eval.benchmark.glyphs import archive
from pitome_mllm_eval.benchmark.sets import scene

SCENES = (16, 6, 7, 20)  # of the held-out test split, of every difficulty
PHOTOGRAPHS = ("astronaut", "rocket")  # public domain
NOTE = (
    "The embedded model <code>tiny</code> was trained on drawn scenes such as these, not on photographs, and knows "
    "some fifty words: shapes, colours, digits, places. The photographs (NASA's Eileen Collins, SpaceX's DSCOVR "
    "launch; public domain) are there to look inside, without a question."
)


def write(folder: Path) -> list[tuple[str, Path]]:
    """Write the pictures into a folder; returns a question ("" = only look) with each, the photographs last."""
    made = []
    for number in SCENES:
        picture, questions = scene(number, split="test")
        path = folder / f"scene {number}.png"
        picture.save(path)
        made.append((questions[0].text, path))
    parts = archive("photos.npz")
    for name in PHOTOGRAPHS:
        whole = np.concatenate([parts[f"train_{name}"], parts[f"eval_{name}"]], axis=1)
        path = folder / f"{name}.png"
        Image.fromarray(whole).save(path)
        made.append(("", path))
    return made
