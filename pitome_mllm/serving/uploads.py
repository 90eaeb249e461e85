"""Images that strangers send, decoded within limits."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import UserError

MAX_BYTES = 20_000_000
MAX_PIXELS = 64_000_000  # decoded at a time, 256 MB; a JPEG is scaled down while it is decoded, so it may have more
MAX_SIDE = 1344  # pixels kept of the longer side: four times what the towers of LLaVA models see
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # decoded by Pillow itself; others start programs or rare decoders


def read_upload(source: Path | bytes, name: str) -> Image.Image:
    """Decode what a stranger sent, a file or its content: RGB, at most `MAX_SIDE` on its longer side.

    A UserError, in which it is called ``name``: no whole image in one of `FORMATS`, or too many bytes or pixels.
    """
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size > MAX_BYTES:
        raise UserError(f"{name!r} has {size / 1e6:.1f} MB; at most {MAX_BYTES / 1e6:.0f} MB are possible")
    data = source if isinstance(source, bytes) else source.read_bytes()
    _check_header(data, name)
    image = decode(io.BytesIO(data), name, FORMATS, MAX_SIDE)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image


def _check_header(data: bytes, name: str) -> None:
    """Refuse by what the file says of itself, before a pixel is decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
            with Image.open(io.BytesIO(data), formats=FORMATS) as file:
                width, height = file.size
                file.draft("RGB", (MAX_SIDE, MAX_SIDE))
                pixels = file.width * file.height
    except UnidentifiedImageError as error:
        raise UserError(f"{name!r} is no picture in one of the formats {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{name!r} would have far too many pixels; scale it down") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{name!r} is damaged: {error}") from error
    if pixels > MAX_PIXELS:
        raise UserError(
            f"{name!r} has {width} x {height} pixels, at most {MAX_PIXELS / 1e6:.0f} million are possible; "
            "scale it down"
        )


def decode(
    source: str | Path | BinaryIO, name: str, formats: Sequence[str] | None = None, side: int | None = None
) -> Image.Image:
    """The image in a file, open or not; RGB, turned as its camera says, transparency on white.

    ``name`` is what messages call it; a JPEG is scaled down on the way, to no less than ``side`` x ``side``. ValueError
    where it is not a whole image in one of the formats (None: those that Pillow knows).
    """
    try:
        with Image.open(source, formats=formats) as file:
            if side is not None:
                file.draft("RGB", (side, side))
            picture = ImageOps.exif_transpose(file)
            picture.load()
    except UnidentifiedImageError as error:
        raise UserError(f"{name!r} is not a picture that Pillow can read; convert it to PNG or JPEG") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the picture {name!r}: {error}") from error
    return _rgb(picture)


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits per pixel; Pillow's own conversion would cut off instead of scaling
        picture = picture.convert("I").point(lambda value: value / 256).convert("L")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")
