"""Pictures of a conversation, and small copies of them to show in the page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pitome_mllm.methods import UserError
from pitome_mllm.serving.uploads import read_upload

THUMBNAIL = 220


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture, RGB, and what it was called."""

    image: Image.Image
    name: str


def open_upload(path: str | Path) -> Picture:
    """Decode a file that a visitor sent; a UserError names it without its folder."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"the picture {path.name!r} is gone; add it again")
    return Picture(read_upload(path, path.name), path.name)


def data_uri(image: Image.Image, side: int = THUMBNAIL) -> str:
    """A small JPEG of the picture as a ``data:`` address, which a page shows without a file or a request."""
    small = image.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
