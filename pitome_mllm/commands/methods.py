"""``pitome-mllm methods``: the table of methods."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Column, Table


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("methods", help="list the methods", description="List the methods there are.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print every method with its summary, where it comes from, and what it sets differently."""
    from ..methods import METHODS

    rows = {
        name: {
            "summary": method.summary,
            "reference": method.reference,
            "options": dict(method.options),
            "settings": dict(method.settings),
        }
        for name, method in METHODS.items()
    }
    if options.json:
        sys.stdout.write(json.dumps(rows) + "\n")
        return
    table = Table(
        Column("method", no_wrap=True), "what it does", "from", "options and settings", box=None, pad_edge=False
    )
    for name, row in rows.items():
        changes = ", ".join(f"{key}={value}" for key, value in {**row["options"], **row["settings"]}.items())
        table.add_row(name, row["summary"], row["reference"], changes)
    Console().print(table)
