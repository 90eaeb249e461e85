"""Pictures with captions or classes, in a folder for each task, or from the hub with `datasets`.

- ``flickr30k/`` and ``coco/``: pictures, and metadata.jsonl with a file_name and captions for each;
- ``imagenet/``: a folder of pictures for each class, in the order of the classes; classes.txt may name them for CLIP.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pitome_mllm.methods import UserError

from ..lmms.tables import TASKS

CLASSES = "imagenet"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
WANTED = 'give a line for each picture: {"file_name": "1.jpg", "captions": ["one", "or more"]}'


@dataclass(frozen=True)
class Data:
    """Pictures of a task, read when they are needed, with captions or a class for each."""

    pictures: Sequence[Any]
    captions: Sequence[Sequence[str]] = ()
    labels: Sequence[int] = ()
    classes: Sequence[str] = ()

    def batches(self, size: int) -> Iterator[list[Image.Image]]:
        """The pictures in order."""
        for start in range(0, len(self.pictures), size):
            yield [_opened(self.pictures[n]) for n in range(start, min(start + size, len(self.pictures)))]

    @property
    def identity(self) -> str:
        """Of names, sizes, captions and classes."""
        files = [(one.name, one.stat().st_size) for one in self.pictures if isinstance(one, Path)]
        about = [files, len(self.pictures), *map(list, (self.captions, self.labels, self.classes))]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _opened(picture: Any) -> Image.Image:
    found = Image.open(picture) if isinstance(picture, Path) else picture["image"]
    return found.convert("RGB")


def data_of(name: str, folder: Path | None, limit: int | None) -> Data:
    """The pictures of a task, the first so many of them; of ImageNet the first of every class in turn."""
    found = (
        _from_hub(name) if folder is None else _classes(folder / name) if name == CLASSES else _captioned(folder / name)
    )
    order = sorted(range(len(found.labels)), key=_turns(found.labels).__getitem__) or range(len(found.pictures))
    chosen = list(order)[:limit]
    pictures, captions, labels = (
        [rows[n] for n in chosen] if len(rows) else [] for rows in (found.pictures, found.captions, found.labels)
    )
    return Data(pictures, captions, labels, found.classes)


def _turns(labels: Sequence[int]) -> list[int]:
    """For each, how many of its class stand before it."""
    seen: dict[int, int] = {}
    return [seen.update({label: seen.get(label, -1) + 1}) or seen[label] for label in labels]


def _captioned(folder: Path) -> Data:
    file = folder / "metadata.jsonl"
    if not file.is_file():
        raise UserError(f"no {str(file)!r}; {WANTED}")
    lines = [(n, line) for n, line in enumerate(file.read_bytes().splitlines(), start=1) if line.strip()]
    if not lines:
        raise UserError(f"no pictures in {str(file)!r}; {WANTED}")
    named = [_named(line, f"line {n} of {str(file)!r}") for n, line in lines]
    return Data([folder / name for name, _ in named], [captions for _, captions in named])


def _named(line: bytes, where: str) -> tuple[str, list[str]]:
    """The file name and the captions that a line says."""
    with suppress(ValueError, TypeError, KeyError):
        row = json.loads(line)
        name, captions = row["file_name"], row["captions"]
        if captions and isinstance(captions, list) and all(isinstance(text, str) for text in (name, *captions)):
            return name, captions
    raise UserError(f"{where} is no picture with captions; {WANTED}")


def _classes(folder: Path) -> Data:
    folders = sorted(one for one in folder.iterdir() if one.is_dir()) if folder.is_dir() else []
    files = [
        (file, n) for n, one in enumerate(folders) for file in sorted(one.iterdir()) if file.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise UserError(f"no pictures in folders of {str(folder)!r}; put a folder for each class there")
    named = folder / "classes.txt"
    names = named.read_text().splitlines() if named.is_file() else [one.name.replace("_", " ") for one in folders]
    if len(names) != len(folders):
        raise UserError(f"{str(named)!r} names {len(names)} classes of {len(folders)} folders; give a line for each")
    return Data([file for file, _ in files], labels=[n for _, n in files], classes=names)


def _from_hub(name: str) -> Data:
    """What the hub's data set holds; Flickr30k is there with all its splits in one."""
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise UserError("data sets of the hub need datasets: pip install datasets; or give --data FOLDER") from error
    rows = load_dataset(TASKS[name].data, split=TASKS[name].split)
    if name == CLASSES:
        return Data(rows, labels=rows["label"], classes=rows.features["label"].names)
    if "split" in rows.column_names:
        rows = rows.select([n for n, split in enumerate(rows["split"]) if split == TASKS[name].split])
    return Data(rows, captions=rows["caption"])
