"""``pitome-mllm cost``: FLOPs, key-value cache and batch size of published models over ratio and keep."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ._options import add_published, check_method, keep, progress
from ._report import print_table

RATIOS, KEEPS = (0.95, 0.9), (0.5, 0.25, 0.125)
COLUMNS = {  # of a row: its heading and how it is written; columns without any figure are left out
    "setting": ("setting", "{}"),
    "tokens": ("visual tokens", "{}"),
    "tower_gflops": ("tower, GFLOPs", "{:.1f}"),
    "llm_gflops": ("LLM, GFLOPs", "{:.0f}"),
    "gflops": ("all, GFLOPs", "{:.1f}"),
    "saved": ("saved", "{:.1%}"),
    "kv_mb": ("KV cache, MB", "{:.1f}"),
    "batch": ("largest batch", "{}"),
}
ABOUT = """Calculated from the models' published sizes; nothing is measured and no weights are needed.
Method {method}{mode}.
Every figure is for one picture with a prompt of {text_tokens} text tokens, up to new token {new_tokens}.

A multiply-add counts as two FLOPs, and only matrix products and convolutions count. The column of the tower holds the
merging, that of the LLM the projector. `ratio` is the share of its patches that every block keeps, `keep` the patches
(of every tile) that are left in the end. The KV cache is in float16.

The largest batch is what `pitome_mllm.costs.memory.largest_batch` says for {memory:g} GB (10^9 bytes) and {weights}
weights: weights, KV cache and a bound on activations, without what the driver of a GPU takes."""


@dataclass(frozen=True)
class Section:
    """What is said about one model; in the rows, None where a tower alone has no such figure."""

    title: str
    rows: list[dict[str, Any]]
    notes: list[str]


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "cost",
        help="FLOPs, KV cache and batch size of published models",
        description="What published models cost with merged tokens, calculated from their sizes without weights.",
    )
    parser.add_argument("shape", nargs="*", metavar="SHAPE", help="such as llava-1.5-7b (default: all but towers)")
    parser.add_argument("--method", default="pitome", metavar="M", help="see `pitome-mllm methods` (%(default)s)")
    add_published(parser)
    parser.add_argument("--ratio", nargs="+", type=float, default=RATIOS, metavar="R", help="shares that blocks keep")
    parser.add_argument(
        "--keep", nargs="+", type=keep, default=KEEPS, metavar="K", help="tokens left, numbers or shares"
    )
    parser.add_argument("--text-tokens", type=int, default=40, metavar="N", help="of the prompt (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=1, metavar="N", help="of the answer (%(default)s)")
    parser.add_argument(
        "--memory", type=gigabytes, default=40.0, metavar="GB", help="for the largest batch (%(default)s)"
    )
    parser.add_argument("--bits", type=int, metavar="4|8", help="of the weights, for the largest batch")
    parser.add_argument("--markdown", action="store_true", help="print the page docs/cost.md instead")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run)


def gigabytes(text: str) -> float:
    """More than nothing."""
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not possible; give the GB that there are, such as 24")
    return float(text)


def run(options: argparse.Namespace) -> None:
    """Print the tables."""
    from ..costs.published import SHAPES, get_shape

    check_method(options.method)
    whole = [name for name, shape in SHAPES.items() if shape.text]
    shapes = {name: get_shape(name) for name in options.shape or whole}
    sections = {}
    with progress("Calculating", total=len(shapes)) as advance:
        for name, shape in shapes.items():
            sections[name] = section(shape, options)
            advance()
    mode = ", as published" if options.published else ", under the library's defaults"
    about = ABOUT.format(**vars(options), mode=mode, weights=f"{options.bits}-bit" if options.bits else "float16")
    if options.json:
        sys.stdout.write(json.dumps({name: asdict(found) for name, found in sections.items()}) + "\n")
    elif options.markdown:
        sys.stdout.write(markdown(list(sections.values()), about))
    else:
        show(list(sections.values()), about)


def section(shape: Any, asked: argparse.Namespace) -> Section:
    """The table of one model over ratio and keep, for one image, and what is said about it."""
    from ..costs.flops import estimate
    from ..costs.memory import largest_batch, weight_bytes
    from ..families.geometry import geometry

    config, method = shape.config(), {"method": asked.method, "published": asked.published}
    counts = {"images": shape.images, "text_tokens": asked.text_tokens, "new_tokens": asked.new_tokens}
    plain, alone = estimate(config, **counts), shape.text is None

    def row(name: str, settings: dict[str, Any]) -> dict[str, Any]:
        cost = estimate(config, **settings, **counts) if settings else plain
        found = {"setting": name.format(cost.visual_tokens), "tokens": shape.images * cost.visual_tokens}
        found |= dict.fromkeys(COLUMNS.keys() - found)
        if not alone:
            found["tower_gflops"] = (cost.tower_flops + cost.merging_flops) / 1e9
            found["llm_gflops"] = (cost.projector_flops + cost.prefill_flops + cost.decode_flops) / 1e9
            found["kv_mb"] = cost.kv_bytes / 1e6
            found["batch"] = largest_batch(config, 1e9 * asked.memory, bits=asked.bits, **settings, **counts)
        return found | {"gflops": cost.flops / 1e9, "saved": 1 - cost.flops / plain.flops}

    rows = [row("plain", {}), *(row(f"ratio {ratio:g}", {**method, "ratio": ratio}) for ratio in asked.ratio)]
    rows += [row("keep {}", {**method, "keep": keep}) for keep in asked.keep]
    notes = [shape.about] if shape.about else []
    if not alone:
        kinds = {"float16": None, "8 bits": 8, "4 bits": 4}
        sizes = [f"{weight_bytes(config, bits=bits) / 1e9:.2f} GB in {name}" for name, bits in kinds.items()]
        notes.append(f"Weights: {', '.join(sizes)}.")
    if (ratio := shape.paper_ratio) is not None:
        saved = row("", {"method": asked.method, "published": True, "ratio": ratio})["saved"]
        notes.append(
            f"At the paper's ratio for it, {ratio:g}, the method as published saves {saved:.1%}. "
            "How many visual tokens its results have, the paper does not say."
        )
    if (paper := shape.paper_cost) is not None:
        left = paper.counts(geometry(config).patches, geometry(config).blocks)
        ours = row("", {"method": asked.method, "published": True, "counts": left})
        notes.append(
            f"The paper's table says {paper.plain:g} and {paper.merged:g} GFLOPs, with a multiply-add as one. With "
            f"{paper.removed} patches less after every block it is {plain.flops / 2e9:.1f} and "
            f"{ours['gflops'] / 2:.2f} here, which saves {ours['saved']:.1%}; no one ratio gives what it says of all."
        )
    return Section(shape.title, rows, notes)


def _cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Headings, and the rows as text; without columns that have no figures."""
    used = {name: c for name, c in COLUMNS.items() if any(row[name] is not None for row in rows)}
    body = [[form.format(row[name]) for name, (_, form) in used.items()] for row in rows]
    return [[heading for heading, _ in used.values()], *body]


def markdown(sections: Sequence[Any], about: str) -> str:
    """All of it as a page."""
    lines = ["# What merging costs and saves", "", "Made by `pitome-mllm cost --markdown > docs/cost.md`.", "", about]
    for found in sections:
        heading, *body = _cells(found.rows)
        lines += ["", f"## {found.title}", "", _line(heading), "|---" + "|---:" * (len(heading) - 1) + "|"]
        lines += [*map(_line, body), "", *(f"- {note}" for note in found.notes)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def show(sections: Sequence[Any], about: str) -> None:
    """All of it in the terminal."""
    for number, found in enumerate(sections, 1):
        heading, *body = _cells(found.rows)
        print_table(heading, body, found.title, [*found.notes, "\n" + about if number == len(sections) else ""])
