"""Files of visitors: what they sent and what was made for them, deleted when they leave."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Collection, Hashable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image


class Belongings:
    """Who owns which file in Gradio's folder.

    Uploads lie there by their content, so that visitors who send the same file share it: it is deleted with the last
    of them, unless somebody has sent it once more and not asked about it yet. What is made for one visitor lies in a
    folder of theirs.

    Parameters
    ----------
    folder : Gradio's; nothing outside it is ever deleted.
    keep : files in it that belong to the page.
    """

    def __init__(self, folder: Path, keep: Collection[Path] = ()) -> None:
        self.folder, self.keep = folder.resolve(), {path.resolve() for path in keep}
        self._sent: dict[Hashable, set[Path]] = {}
        self._known: dict[Path, int | None] = {}  # when those that were asked about came
        self._lock = threading.Lock()

    def add(self, key: Hashable, paths: Iterable[Any]) -> None:
        """A visitor sent these files."""
        found = {Path(path).resolve() for path in paths}
        mine = {path for path in found - self.keep if path.is_relative_to(self.folder)}
        with self._lock:
            self._sent.setdefault(key, set()).update(mine)
            self._known |= {path: _came(path) for path in mine}

    def path(self, key: Hashable, name: str) -> Path:
        """Where a file for one visitor goes."""
        own = self._own(key)
        own.mkdir(parents=True, exist_ok=True)
        return own / name

    def drawing(self, key: Hashable, image: Image.Image | None) -> str | None:
        """The file of a picture for one visitor; another picture has another name."""
        if image is None:
            return None
        path = self.path(key, f"{hashlib.sha256(image.tobytes()).hexdigest()[:16]}.png")
        image.save(path, compress_level=1)
        return str(path)

    def drop(self, key: Hashable) -> None:
        """A visitor left."""
        with self._lock:
            mine = self._sent.pop(key, set()).difference(*self._sent.values())
            known = {path: self._known.pop(path) for path in mine}
        for path, came in known.items():
            if _came(path) == came:
                path.unlink(missing_ok=True)
        shutil.rmtree(self._own(key), ignore_errors=True)

    def _own(self, key: Hashable) -> Path:
        return self.folder / f"visitor-{hashlib.sha256(str(key).encode()).hexdigest()[:16]}"  # a key is anything


def _came(path: Path) -> int | None:
    """When a file came into its folder; None = it is not there."""
    return path.stat().st_ctime_ns if path.exists() else None
