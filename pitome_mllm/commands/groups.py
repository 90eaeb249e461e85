"""``pitome-mllm groups``: draw which patches of a picture were merged."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from .inputs import encode, read_subject
from .options import add_merging, add_model, add_subject, check_method, merging, open_model, progress

ANY_QUESTION = "what is there"  # the tower merges before the question is read, so that its wording does not matter


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "groups",
        help="draw which patches were merged",
        description="Draw which patches of a picture end in the same visual token, one panel for each method.",
    )
    add_subject(parser, question=False)
    add_model(parser)
    add_merging(parser, several=True)
    parser.add_argument("--style", default="outline", help="outline or mean (%(default)s)")
    parser.add_argument("--side", type=int, metavar="PX", help="longer side of each panel in pixels")
    parser.add_argument("--out", default="groups.png", metavar="FILE", help="where to write it (%(default)s)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Write one picture: what the tower saw, then one panel for each method.

    Raises
    ------
    ValueError : a mistake the user can mend, in one sentence.
    """
    from ..visualize import seen_by, side_by_side

    for method in options.method or ():
        check_method(method)
    check_picture_file(options.out)
    subject = read_subject(options)
    model, processor = open_model(options)
    panels, titles = [seen_by(processor, subject.picture)], ["picture"]
    for method in options.method or [None]:
        with progress("Drawing"):
            panel, title = _panel(options, model, processor, subject, method)
        panels.append(panel)
        titles.append(title)
    write_picture(side_by_side(panels, titles), options.out)
    sys.stdout.write(f"{options.out}: {subject.name}, {'; '.join(titles[1:])}\n")


def _panel(options: argparse.Namespace, model: Any, processor: Any, subject: Any, method: str | None) -> Any:
    """The drawing for one method and its title."""
    from ..attach import attach

    with attach(model, method, **merging(options)) as handle:
        inputs = encode(model, processor, subject, subject.question or ANY_QUESTION, 1)
        model.generate(**inputs, do_sample=False, max_new_tokens=1)
        plan = handle.plan
        title = f"{plan.method}: {plan.keep} of {plan.available} tokens"
        return drawing(processor, subject.picture, handle.stats, style=options.style, side=options.side), title


def drawing(processor: Any, picture: Image.Image, stats: Any, style: str = "outline", side: int | None = None) -> Any:
    """The groups of the last run's only picture, drawn on what the tower saw.

    Raises
    ------
    ValueError : the method forms no groups.
    """
    from ..visualize import draw_groups, seen_by

    if stats.groups is None:
        raise ValueError(f"{stats.method} forms no groups, so there is nothing to draw; choose another --method")
    ahead = stats.plan.geometry.visible_class_tokens  # in front of the patches, never merged, and not in the picture
    groups, sizes = stats.groups[0, ahead:], stats.sizes[0, ahead:]
    groups = (groups - ahead).where(groups >= 0, groups)  # -1 stays: a dropped patch
    return draw_groups(seen_by(processor, picture), groups, sizes, style=style, side=side)


def check_picture_file(path: str) -> None:
    """Refuse, before any work is done, a file that could not be written in the end."""
    if Path(path).suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{path!r} does not end like a picture file; choose a name such as groups.png")
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"no folder {str(Path(path).parent)!r} to write {Path(path).name!r} into; create it first")


def write_picture(picture: Image.Image, path: str) -> None:
    """Save the picture.

    Raises
    ------
    ValueError : the file cannot be written.
    """
    try:
        picture.save(path)
    except OSError as error:
        raise ValueError(f"cannot write {path!r}: {error}") from error
