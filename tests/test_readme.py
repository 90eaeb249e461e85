"""README and docs: short, with links that lead somewhere, and commands and targets that there are."""

import re
import shlex
from pathlib import Path

import pytest

from pitome_mllm import METHODS, cli

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FILES = [*PAGES, *(path for folder in ("pitome_mllm", "eval", "demo") for path in (ROOT / folder).rglob("*.py"))]
TEXTS = {path: path.read_text() for path in FILES}
NAMED = [pytest.param(path, id=path.name) for path in PAGES]


def anchor(heading: str) -> str:
    """What a link to a heading ends with."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def commands(text: str) -> set[str]:
    """Whole command lines: of blocks, and those between back quotes that are not just a command's name."""
    lines = re.findall(r"^(?:    )?(pitome-mllm .*)$", text, re.MULTILINE)
    lines += re.findall(r"&& (pitome-mllm .*)$", text, re.MULTILINE)
    lines += re.findall(r"`(pitome-mllm [^`]+)`", text)
    return {" ".join(line.split(" #")[0].split()) for line in lines}


def test_the_first_page_is_short():
    assert len(TEXTS[README].splitlines()) <= 120


@pytest.mark.parametrize("page", NAMED)
def test_links_lead_somewhere(page):
    for target in re.findall(r"(?:\]\(|src=\")(?!https?:)([^)\s\"]+)[)\"]", TEXTS[page]):
        name, _, part = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        if part:
            assert part in map(anchor, re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)), target


def test_every_page_of_docs_is_reached_from_the_first():
    seen, ahead = set(), [README]
    while ahead:
        page = ahead.pop()
        seen.add(page)
        links = re.findall(r"\]\((?!https?:)([^)#\s]+\.md)", TEXTS.get(page, ""))
        ahead += {(page.parent / link).resolve() for link in links} - seen
    assert set(PAGES) <= seen


@pytest.mark.parametrize("page", NAMED)
def test_commands_are_understood(page):
    for line in commands(TEXTS[page]):
        words = shlex.split(line)[1:]
        if words == ["cost", "--markdown", ">", "docs/cost.md"]:
            words = words[:2]
        try:
            options = cli.build_parser().parse_args(words)
        except SystemExit as end:
            options = None
            required = words in (["reproduce"], ["--help"])  # named, not run
            assert end.code == 0 or required, line
        given = getattr(options, "method", None) or []
        assert set([given] if isinstance(given, str) else given) <= {*METHODS}, line


@pytest.mark.parametrize("page", NAMED)
def test_targets_of_make_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"`make (?:\w+=\S+\s+)?([\w-]+)`|^    make ([\w-]+)", TEXTS[page], re.MULTILINE)
    assert {first or second for first, second in named} <= targets


def test_what_contributors_are_told_of_is_every_target():
    made = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert made - {"chromium", "ask", "demo"} <= set(re.findall(r"[\w-]+", TEXTS[ROOT / "CONTRIBUTING.md"]))


def test_nothing_asks_an_index_for_this_package():
    """It is on none: what to install is named from a checkout."""
    assert not [path for path, text in TEXTS.items() if re.search(r"pip install\s+['\"]?pitome", text)]


def test_names_of_earlier_releases_are_gone():
    assert not [path for path in PAGES if re.search(r"pitome-tuned|positions=|llm_size_bias", TEXTS[path])]
