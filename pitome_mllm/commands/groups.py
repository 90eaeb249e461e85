"""``pitome-mllm groups``: draw which patches of an image were merged."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import UserError
from ._inputs import encode, read_subject
from ._options import add_merging, add_model, add_subject, check_method, merging, open_model, progress

CAPTIONS = {  # by what is drawn: what its marks mean
    "outline": "An outline: patches of one visual token. Dot: stayed alone. Diamond: protected. Hatched: dropped.",
    "mean": "A filled area: patches of one visual token, in their mean colour. Hatched: dropped.",
    "size": "A filled area: patches of one visual token. Dot: stayed alone. Diamond: protected. Hatched: dropped.",
    "energy": "Energy of every token before a merge: the highest merge first. The colours mean the same in all panels. "
    "Dot: left out. Hatched: dropped before.",
}
ANY_QUESTION = "what is there"  # the tower merges before the question is read, so that its wording does not matter


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "groups",
        help="draw which patches were merged",
        description="Draw which patches of a picture end in the same visual token, one panel for each method. Of a "
        "picture that the model sees in several tiles, all are drawn.",
    )
    add_subject(parser, question=False)
    add_model(parser)
    add_merging(parser, several=True)
    show = parser.add_mutually_exclusive_group()
    show.add_argument("--style", default="outline", help="outline, mean or size (%(default)s)")
    show.add_argument("--energy", action="store_true", help="the energy of every token before every merge instead")
    parser.add_argument("--steps", action="store_true", help="the groups after every merge, and a chart of the tokens")
    parser.add_argument("--side", type=int, metavar="PX", help="longer side of each panel in pixels")
    parser.add_argument("--out", default="groups.png", metavar="FILE", help="where to write it (%(default)s)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Write one image: what the tower saw, then one panel for each method, or one for each of its merges."""
    from ..visualize import below, captioned, like, side_by_side, tiles_seen_by

    for method in options.method or ():
        check_method(method)
    check_picture_file(options.out)
    subject = read_subject(options)
    model, processor = open_model(options)
    with progress("Drawing"):
        runs = [_merged(options, model, processor, subject, method) for method in options.method or [None]]
        titles = [f"{stats.method}: {_counted(stats)} tokens" for stats in runs]
        tiles = tiles_seen_by(processor, subject.picture)
        whole = subject.picture if len(tiles) > 1 else tiles[0]
        if options.energy or options.steps:
            rows = step_rows(tiles, runs, titles, options)
        else:
            panels = [drawing(processor, subject.picture, stats, options.style, options.side) for stats in runs]
            rows = [([like(whole, panels[0]), *panels], ["picture", *titles])]
        sheets = [side_by_side(panels, heads, columns=_columns(len(panels))) for panels, heads in rows]
    caption = CAPTIONS["energy" if options.energy else options.style]
    write_picture(captioned(below(sheets), caption), options.out)
    sys.stdout.write(f"{options.out}: {subject.name}, {'; '.join(titles)}\n")


def _columns(panels: int) -> int:
    """Panels per row: up to five in one row, more of them in a sheet a little wider than high."""
    return panels if panels <= 5 else isqrt(panels - 1) + 2


def _counted(stats: Any) -> str:
    """Visual tokens after and before merging: of a tile where the tower merged tiles, else of the picture."""
    if stats.where != "packed":
        return f"{stats.tokens_after} of {stats.tokens_before}"
    return f"{sum(stats.lengths)} of {sum(map(len, stats.groups))}"


def _merged(options: argparse.Namespace, model: Any, processor: Any, subject: Any, method: str | None) -> Any:
    """What one method did to the image."""
    from ..attach import attach
    from ..visualize import check_drawable

    with attach(model, method, energies=True, **merging(options)) as handle:
        check_drawable(handle.plan, steps=options.energy or options.steps)
        inputs = encode(model, processor, subject, subject.question or ANY_QUESTION, 1)
        model.generate(**inputs, do_sample=False, max_new_tokens=1)
        return handle.stats


def step_rows(
    tiles: Sequence[Image.Image], runs: Sequence[Any], titles: Sequence[str], options: argparse.Namespace
) -> list[tuple[list[Image.Image], list[str]]]:
    """For every run and tile the panels of its merges, the tile ahead of them, and their titles."""
    from ..visualize import draw_counts, draw_step_energies, draw_steps, energy_range, like, token_counts

    span, rows = energy_range(runs), []
    for stats, title in zip(runs, titles, strict=True):
        if not stats.merges:
            raise UserError(f"{stats.method} merged nothing, so there are no steps to draw; keep fewer tokens")
        for image, tile in enumerate(tiles):
            if options.energy:
                panels, heads = draw_step_energies(tile, stats, image, side=options.side, span=span)
            else:
                panels, heads = draw_steps(tile, stats, image, style=options.style, side=options.side)
            if options.steps:
                panels.append(draw_counts(token_counts(stats), panels[0].size))
                heads.append("tokens")
            number = f", tile {image + 1} of {len(tiles)}" if len(tiles) > 1 else ""
            rows.append(([like(tile, panels[0]), *panels], [title + number, *heads]))
    return rows


def drawing(processor: Any, picture: Image.Image, stats: Any, style: str = "outline", side: int | None = None) -> Any:
    """The groups of the last run's only image, drawn on what the tower saw of it: one view, or its tiles."""
    from ..visualize import draw_run, side_by_side, tiles_seen_by

    drawings = draw_run(tiles_seen_by(processor, picture), stats, style=style, side=side)
    return drawings[0] if len(drawings) == 1 else side_by_side(drawings, columns=isqrt(len(drawings) - 1) + 1)


def check_picture_file(path: str) -> None:
    """Refuse, before any work is done, a file that could not be written in the end."""
    if Path(path).suffix.lower() not in Image.registered_extensions():
        raise UserError(f"{path!r} does not end like a picture file; choose a name such as groups.png")
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f"no folder {str(Path(path).parent)!r} to write {Path(path).name!r} into; create it first")


def write_picture(picture: Image.Image, path: str) -> None:
    """Save the image."""
    try:
        picture.save(path)
    except OSError as error:
        raise UserError(f"cannot write {path!r}: {error}") from error
