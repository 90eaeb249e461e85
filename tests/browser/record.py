"""Keep what the tests of the chat measured: with PITOME_RECORD=1 in eval/results/chat.csv and in docs/chat.md."""

import os
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from pitome_mllm_eval.documents import markdown, marks, put_in, read, write_csv
from pitome_mllm_eval.provenance import processor_name

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "eval" / "results" / "chat.csv"
MARKS = marks("chat", "make record-chat")


@dataclass(frozen=True)
class Figure:
    """One figure, and where it comes from; ``load`` is the machine's load average of the last minute."""

    name: str
    value: str
    command: str
    processor: str
    load: str
    date: str


def record(command: str, **values: str) -> None:
    """Put figures, by their name, in the place of those of the same name; nothing unless it is asked for."""
    if os.environ.get("PITOME_RECORD") != "1":
        return
    known = {row["name"]: Figure(**row) for row in read(RESULTS, "make record-chat")} if RESULTS.exists() else {}
    about = (f"make {command}", processor_name(), f"{os.getloadavg()[0]:.1f}", date.today().isoformat())
    known |= {name: Figure(name, value, *about) for name, value in values.items()}
    write_csv(RESULTS, known.values())
    put_in(ROOT / "docs" / "chat.md", table(list(known.values())), MARKS)


def table(figures: list[Figure]) -> str:
    """The figures in Markdown."""
    lines = [["the chat with the embedded model", "", "measured by", "load average", "date"]]
    lines += [[f.name.replace("_", " "), f.value, f"`{f.command}`", f.load, f.date] for f in figures]
    return f"{markdown(lines)}\n\nProcessor: {' / '.join(dict.fromkeys(f.processor for f in figures))}."
