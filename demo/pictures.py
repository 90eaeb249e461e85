"""Pictures that strangers send: decoded within limits, and small copies to show in the page."""

from __future__ import annotations

import base64
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from pitome_mllm.commands.inputs import read_picture

MAX_BYTES = 20_000_000
MAX_PIXELS = 40_000_000  # a phone's camera; more would take over 160 MB once decoded
MAX_SIDE = 1344  # pixels kept of the longer side: four times what the towers of LLaVA models see
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # decoded by Pillow itself; others start programs or rare decoders
THUMBNAIL = 220


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture, RGB, at most `MAX_SIDE` on its longer side, and what it was called."""

    image: Image.Image
    name: str


def open_upload(path: str | Path) -> Picture:
    """Decode a file that a visitor sent.

    Raises
    ------
    ValueError : not a whole picture in one of `FORMATS`, or more bytes or pixels than allowed. It names the file
        without its folder.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"the picture {path.name!r} is gone; add it again")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path.name!r} has {size / 1e6:.1f} MB; at most {MAX_BYTES / 1e6:.0f} MB are possible")
    _check_header(path)
    try:
        image = read_picture(path)
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), path.name)) from error
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return Picture(image, path.name)


def _check_header(path: Path) -> None:
    """Refuse by what the file says of itself, before a pixel is decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
            with Image.open(path, formats=FORMATS) as file:
                width, height = file.size
    except UnidentifiedImageError as error:
        raise ValueError(f"{path.name!r} is no picture in one of the formats {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path.name!r} would have far too many pixels; scale it down") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path.name!r} is damaged: {str(error).replace(str(path), path.name)}") from error
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{path.name!r} has {width} x {height} pixels, at most {MAX_PIXELS / 1e6:.0f} million are possible; "
            "scale it down"
        )


def data_uri(image: Image.Image, side: int = THUMBNAIL) -> str:
    """A small JPEG of the picture as a ``data:`` address, which a page shows without a file or a request."""
    small = image.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
