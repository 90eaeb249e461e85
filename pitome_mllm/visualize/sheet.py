"""Several drawings on one sheet, and the chart of tokens per block."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from ..methods import UserError
from .canvas import DPI, below, font_of, painted
from .groups import PALETTE

GAP = 16  # pixels between images


def side_by_side(
    pictures: Sequence[Image.Image], titles: Sequence[str] | None = None, *, columns: int | None = None
) -> Image.Image:
    """Images at the height of the tallest, each under its title, on white; in one row, or in rows of ``columns``."""
    titles = [""] * len(pictures) if titles is None else list(titles)
    if not pictures or len(titles) != len(pictures):
        raise UserError(f"got {len(pictures)} pictures and {len(titles)} titles; give one title for each picture")
    columns = columns or len(pictures)
    height = max(picture.height for picture in pictures)
    scaled = [p.convert("RGB").resize((max(1, round(p.width * height / p.height)), height)) for p in pictures]
    starts = range(0, len(pictures), columns)
    return below([_row(scaled[i : i + columns], titles[i : i + columns]) for i in starts])


def captioned(sheet: Image.Image, text: str) -> Image.Image:
    """The sheet above a line of text, in as many lines as it takes."""
    font = font_of(max(12, min(sheet.width // 80, 40)))
    lines = _wrap(text, font, sheet.width - 2 * GAP)
    box = ImageDraw.Draw(sheet).multiline_textbbox((0, 0), lines, font=font)
    foot = Image.new("RGB", (sheet.width, int(box[3]) + GAP), "white")
    ImageDraw.Draw(foot).multiline_text((GAP, 0), lines, fill="black", font=font)
    return below([sheet, foot])


def like(picture: Image.Image, drawing: Image.Image) -> Image.Image:
    """The image at the drawing's width, on white down to the drawing's height, to stand beside it."""
    height = max(1, round(picture.height * drawing.width / picture.width))
    sheet = Image.new("RGB", drawing.size, "white")
    sheet.paste(picture.convert("RGB").resize((drawing.width, height)), (0, 0))
    return sheet


def _row(pictures: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """Images of one height in a row."""
    height = pictures[0].height
    font = font_of(max(12, height // 24))
    texts = [_wrap(title, font, picture.width) for title, picture in zip(titles, pictures, strict=True)]
    brush = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    head = max(brush.multiline_textbbox((0, 0), text, font=font)[3] for text in texts)
    head = int(head) + GAP if any(titles) else 0
    width = sum(p.width for p in pictures) + GAP * (len(pictures) + 1)
    sheet = Image.new("RGB", (width, height + head + 2 * GAP), "white")
    brush = ImageDraw.Draw(sheet)
    left = GAP
    for picture, text in zip(pictures, texts, strict=True):
        brush.multiline_text((left, GAP), text, fill="black", font=font)
        sheet.paste(picture, (left, GAP + head))
        left += picture.width + GAP
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text with line breaks between words so that it fits `width` pixels where its words allow."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def draw_counts(counts: Sequence[int], size: tuple[int, int] = (672, 672)) -> Image.Image:
    """A chart, of a width and height in pixels, of the tokens before the first step and after each of them."""
    figure = Figure((size[0] / DPI, size[1] / DPI), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    bars = axis.bar(range(len(counts)), counts, color=PALETTE[0] / 255)
    axis.bar_label(bars, rotation=90 if len(counts) > 16 else 0, fontsize="small", padding=2)
    axis.set(xlabel="tokens after so many steps")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.margins(y=0.1)
    return painted(figure)
