"""The chat as HTML, and the command that serves it, as far as they go without Gradio."""

import re
import shutil
import socket
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from pitome_mllm import cli
from pitome_mllm.commands import _options, demo
from pitome_mllm.costs.answer import AnswerCost
from pitome_mllm_demo import view
from pitome_mllm_demo.pictures import Picture
from pitome_mllm_demo.turns import Reply, Turn

NASTY = (
    '![x](http://evil.example/a.png)\n\n<img src="http://evil.example/b.png" onerror="alert(1)">\n# **bold** & $$x$$'
)


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.words = [], ""

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words += data


def parsed(html):
    tags = Tags()
    tags.feed(html)
    return tags


def turn(question=NASTY, text=NASTY, **reply):
    plain = AnswerCost(576, 590, 100.0, 200.0, 50.0, 2.4, 4.3)
    merged = AnswerCost(144, 158, 50.0, 80.0, 55.5, 0.65, 1234.5)
    replies = {
        "plain": Reply("plain · all 576 tokens", None, "tiny", text, "done", figures=plain, plain=plain),
        "merged": Reply(
            "tome · 144", None, "tiny", text, **{"state": "done", "figures": merged, "plain": plain, **reply}
        ),
    }
    for name, value in reply.items():
        setattr(replies["merged"], name, value)
    return Turn(question, [Picture(Image.new("RGB", (40, 30)), NASTY)], replies)


def test_what_others_wrote_is_shown_and_never_obeyed():
    """No blank line and no tag of theirs: Markdown inside a block of HTML is text."""
    for message in view.messages([turn()]):
        tags = parsed(message["content"])
        assert "\n" not in message["content"]
        assert "![x](http://evil.example/a.png)" in tags.words and "<img src=" in tags.words
        images = [attributes for tag, attributes in tags.found if tag == "img"]
        assert all(image["src"].startswith("data:image/jpeg;base64,") for image in images)
        assert not any("onerror" in attributes for _, attributes in tags.found)


def test_the_strip_has_every_figure_and_ratios_beside_merged_ones():
    _, said = view.messages([turn()])
    words = parsed(said["content"]).words
    for name in (
        "visual tokens",
        "prompt tokens",
        "tower, ms",
        "1st token, ms",
        "each token, ms",
        "KV cache, MB",
        "GFLOPs",
    ):
        assert said["content"].count(f">{name}<") == 2
    kinds = re.findall(r'class="pm-ratio pm-(\w+)"', said["content"])
    assert kinds == ["better"] * 4 + ["worse", "better", "worse"] and words.count("▲") == 2
    assert "50% of the time to the first token went to the vision tower" in words  # of the plain model, 100 of 200 ms
    assert re.findall(r"×\d+\.\d\d", words) == ["×0.25", "×0.27", "×0.50", "×0.40", "×1.11", "×0.27", "×287.09"]
    assert "1,234" in words or "1,235" in words
    assert words.count("Saved: 75% of the visual tokens, 73% of the KV cache.") == 1  # FLOPs became more in this one


def test_where_nothing_is_saved_nothing_is_promised():
    assert "Nothing saved." in view.figures(AnswerCost(576), {"visual_tokens": 1.0, "gflops": 1.1}, "merged")
    assert "Saved" not in view.figures(AnswerCost(576), {}, "plain")


@pytest.mark.parametrize(
    "reply, words",
    [
        ({"state": "waiting", "ahead": 2}, "Waiting for 2 before this one"),
        ({"state": "waiting"}, "Looking…"),
        ({"state": "stopped"}, "(stopped)"),
    ],
)
def test_states_are_said(reply, words):
    assert words in parsed(view.replies(turn(**reply))).words


def test_a_picture_without_a_question():
    only = turn(question="")
    assert "Only look at it" in view.question(only) and "without a question" in view.replies(only)


def test_figures_that_are_not_known_are_left_out():
    strip = view.figures(AnswerCost(144, tower_ms=12.0), {}, "merged")
    assert parsed(strip).words == "visual tokens144tower, ms12"


@pytest.fixture
def started(monkeypatch):
    """Have the command start this in place of the page."""

    def start(serve):
        monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # which the command sets: put back at the end
        monkeypatch.setattr(demo.signal, "signal", lambda *_: None)
        monkeypatch.setattr(demo, "companion", lambda *_: SimpleNamespace(serve=serve, Engine=lambda *_: None))
        monkeypatch.setattr(demo, "open_model", lambda options: (None, None))

    return start


@pytest.mark.parametrize(
    "given, expected",
    [([], ("127.0.0.1", False)), (["--host", "0.0.0.0"], ("0.0.0.0", False)), (["--share"], ("127.0.0.1", True))],
)
def test_others_get_in_only_where_that_is_asked_for(given, expected, started):
    served = []
    started(lambda engine, folder, host, port, share, **_: served.append((host, share)))
    assert cli.main(["demo", *given]) == 0
    assert served == [expected]


def test_only_an_address_that_cannot_be_listened_on_is_the_users_mistake(started, monkeypatch, capsys):
    """A full disk, say, is not; and which port is free is known before a model is loaded."""

    def serve(*_, **__):
        raise OSError("no space left on device")

    started(serve)
    with pytest.raises(OSError, match="no space left"):
        cli.main(["demo"])
    with socket.socket() as taken, socket.socket() as other:
        taken.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        taken.listen()
        port, free = taken.getsockname()[1], other.getsockname()[1]
        other.close()
        for given in (["--port", str(port)], ["--host", "192.0.2.1"]):
            capsys.readouterr()
            assert cli.main(["demo", *given]) == 2
            said = capsys.readouterr()
            assert said.out == "" and said.err.startswith("pitome-mllm: cannot listen on ")
        monkeypatch.setattr(_options, "PORTS", (port, free))
        with _options.bound("127.0.0.1", None) as found:
            assert found.getsockname()[1] == free


def test_a_chromium_is_installed_only_where_nothing_is_upgraded(tmp_path):
    """`make chromium` with stand-ins for the commands that it calls."""
    made = {
        "playwright": "exit 1",
        "apt-get": 'echo "$*" >> apt.log; case "$*" in *simulate*) echo "Inst libc6 [2.36] (2.41 Debian)";; esac',
    }
    for name, does in made.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    for tool in ("sh", "grep", "make", "touch"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    (tmp_path / ".ready").touch()
    root = Path(__file__).parents[1]
    command = ["make", "-f", root / "Makefile", "-o", f"{tmp_path}/.ready", f"BROWSER={tmp_path}", "chromium"]
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": f"{tmp_path}/bin"}, capture_output=True, text=True)
    assert done.returncode != 0 and "no Chromium without upgrading" in done.stderr and "libc6" in done.stdout
    assert (tmp_path / "apt.log").read_text().splitlines() == ["update", "install --simulate chromium"]


def test_without_gradio_the_command_says_how_to_get_it(capsys, monkeypatch):
    for module in [name for name in sys.modules if name.startswith("pitome_mllm_demo.app")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["demo"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert "needs 'gradio', which is not installed; in a checkout of pitome-mllm: pip install '.[demo]'" in said.err
