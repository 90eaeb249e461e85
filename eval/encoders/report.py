"""What was measured with real weights, as a table and a plot of docs/encoders.md."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..documents import markdown, panels, read, save, style
from ..provenance import RESULTS

OUT, COMMAND = RESULTS / "real-clip.csv", "make real-clip"
MODELS = {
    "clip-vit-b-16": "CLIP ViT-B/16, its matrices once in 8 bits",
    "dinov2-vit-s-14": "DINOv2 ViT-S/14, tuned to tell salient regions",
}
PLOTTED = ("as published", "every"), ("library", "every"), ("library", "6")
Found = dict[str, str]


def results(path: Path = OUT) -> list[Found]:
    """The rows of the CSV."""
    return read(path, COMMAND, ("model", "method", "how", "points", "tokens", "cosine", "neighbour", "pictures"))


def text(rows: list[Found]) -> str:
    """A table for each model, and what both are of."""
    parts = []
    for model, title in MODELS.items():
        if own := [row for row in rows if row["model"] == model]:
            plain = own[0]
            kinds = f", own kind {_percent(plain, 'category')}" if plain.get("category") else ""
            parts.append(
                f"**{title}**: {plain['tokens']} patches, {plain['gflops']} GFLOPs{kinds}.\n\n{_table(own[1:])}"
            )
    first, commits = rows[0], ", ".join(dict.fromkeys(row["commit"] for row in rows))
    about = f"""Cosine: between merged and plain embeddings of a picture, with its 95 % bootstrap interval in brackets.
Nearest: per cent of pictures whose nearest other picture is the plain model's. Kind: per cent of stamps whose nearest
other stamp is of their own kind. GFLOPs are counted, a multiply-add as two. {first["pictures"]} pictures,
{first["device"]}, torch {first["torch"]}, transformers {first["transformers"]}, commit {commits}, {first["date"]}."""
    shown = ["![What CLIP loses over GFLOPs, by method](encoders.png)"] if len(_left(_first(rows))) > 1 else []
    return "\n\n".join([*parts, about, *shown])


def _percent(row: Found, name: str) -> str:
    """With its interval."""
    value, low, high = (
        f"{100 * float(row[n]):.0f}" if row.get(n) else "-" for n in (name, f"{name}_low", f"{name}_high")
    )
    return f"{value} ({low} to {high})" if row.get(name) else "-"


def _table(rows: list[Found]) -> str:
    """Settings down, and what is left across."""
    left = _left(rows)
    heads = [f"{tokens} left: cosine, nearest, kind, GFLOPs" for tokens in left]
    lines = [["method", "how", "merges", *heads]]
    for key in dict.fromkeys((row["method"], row["how"], row["points"]) for row in rows):
        own = {_near(row, left): row for row in rows if (row["method"], row["how"], row["points"]) == key}
        lines.append([*key, *(_cell(own[tokens]) if tokens in own else "-" for tokens in left)])
    return markdown(lines, 3)


def _first(rows: list[Found]) -> list[Found]:
    """Those of CLIP."""
    return [row for row in rows if row["model"] == next(iter(MODELS))]


def _left(rows: list[Found]) -> list[int]:
    """What merging in every block was measured to leave."""
    return sorted({int(row["tokens"]) for row in rows if row["points"] == "every"}, reverse=True)


def _near(row: Found, left: Iterable[int]) -> int:
    return min(left, key=lambda tokens: abs(tokens - int(row["tokens"])))


def _cell(row: Found) -> str:
    span = f"({float(row['cosine_low']):.3f} to {float(row['cosine_high']):.3f})"
    nearest = f"{100 * float(row['neighbour']):.0f}"
    return ", ".join([f"{float(row['cosine']):.4f} {span}", nearest, _percent(row, "category"), row["gflops"]])


def plot(rows: list[Found], path: Path) -> None:
    """What is lost over GFLOPs, by method, for CLIP; nothing where there is one point of each line."""
    rows = _first(rows)
    if len(_left(rows)) < 2:
        return
    methods, lines = list(dict.fromkeys(row["method"] for row in rows)), {}
    titles = ["as published, every block", "library, every block", "library, 6 merges"]
    figure, axes = panels(titles, "1 - cosine to the plain embedding", xlabel="GFLOPs", xlim=(10, 36), yscale="log")
    for axis, key in zip(axes, PLOTTED, strict=True):
        for number, method in enumerate(methods):
            own = [row for row in rows if (row["method"], row["how"], row["points"]) == (method, *key)]
            own.sort(key=lambda row: float(row["gflops"]))
            if len(own) > 1:
                lost = [1 - float(row["cosine"]) for row in own]
                (lines[method],) = axis.plot(
                    [float(row["gflops"]) for row in own], lost, marker="o", ms=3, **style(number)
                )
    save(figure, path, lines)
