"""`pitome-mllm serve --engine vllm` up to where vLLM takes over; `make test-vllm` goes on from there."""

import json
import os
import shlex
import shutil
import socket
import sys
from functools import partial

import pytest
from checks import command_line

from pitome_mllm.commands import serve
from pitome_mllm.loading import TINY
from pitome_mllm.serving.vllm import BEGINNING, MIDDLEWARE, versions

ENGINE = ("serve", "--engine", "vllm", "--port")


@pytest.fixture
def run(capsys):
    """Run a command line; returns the exit code, stdout and stderr."""
    return partial(command_line, capsys)


@pytest.fixture
def port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def started(monkeypatch):
    """What this process would have become."""
    found = []
    monkeypatch.setattr(versions, "check", lambda: None)
    monkeypatch.setattr(os, "execv", lambda path, line: found.append((path, line)))
    return found


def test_the_line_of_vllm_says_what_was_asked(run, port, started):
    asked = ("--method", "tome", "--keep", 72, "--merges", 3, "--host", "localhost", "--dtype", "bfloat16")
    code, out, err = run(*ENGINE, port, *asked, "--", "--max-model-len", 2048, "--api-key", "a b")
    ((path, line),) = started
    assert (code, err, path) == (0, "", sys.executable) and line[:3] == [path, "-m", "vllm.entrypoints.cli.main"]
    assert shlex.split(out) == ["vllm", *line[3:]] and line[3:5] == ["serve", str(TINY)]
    told = json.loads(line[line.index("--hf-overrides") + 1])
    assert told["architectures"] == ["PitomeLlavaForConditionalGeneration"]
    assert told["visual_token_merging"] == {"method": "tome", "keep": 72, "merges": 3}
    for name, value in ("host", "localhost"), ("port", str(port)), ("dtype", "bfloat16"), ("served-model-name", "tiny"):
        assert line[line.index(f"--{name}") + 1] == value
    assert line[-4:] == ["--max-model-len", "2048", "--api-key", "a b"]


def test_chats_begin_as_texts_do(run, port, started, tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text("{{ bos_token }}" + template.read_text())
    for model, middleware in (("tiny", BEGINNING), (tmp_path / "model", MIDDLEWARE)):
        assert run(*ENGINE, port, "--model", model)[0] == 0
        assert started[-1][1][started[-1][1].index("--middleware") + 1] == middleware
    template.unlink()
    code, _, err = run(*ENGINE, port, "--model", tmp_path / "model")
    assert code == 2 and "has no chat template" in err
    assert run(*ENGINE, port, "--model", tmp_path / "model", "--", "--chat-template", "own.jinja")[0] == 0


@pytest.mark.parametrize("there", [True, False])
def test_vllm_serves_where_it_is_installed(run, port, started, monkeypatch, there):
    other = []
    monkeypatch.setattr(serve, "packages_distributions", lambda: {"vllm": ["vllm"]} if there else {})
    monkeypatch.setitem(serve.ENGINES, "transformers", other.append)
    assert run("serve", "--port", port)[0] == 0
    assert (len(started), len(other)) == (there, not there)


@pytest.mark.parametrize(
    "asked, message",
    [
        (["--bits", 4], "--bits is not possible with vLLM; vLLM quantises in its own ways"),
        (["--device", "cpu"], "--device is not possible with vLLM; vLLM finds devices itself"),
        (["--allow-urls"], "--allow-urls is not possible with vLLM; vLLM fetches from private addresses too"),
        (["--keep", 577], "577"),
        (["--keep", 0], "keep=0"),
        (["--method", "visionzip"], "visionzip needs attention"),
        (["--", "--hf_overrides", "{}"], "--hf-overrides is where vLLM is told of merging"),
        (["--engine", "transformers", "--", "--max-model-len", 9], "'--max-model-len 9' is for vLLM"),
        (["--engine", "sglang"], "invalid choice: 'sglang'"),
    ],
)
def test_what_an_engine_does_not_take_is_refused_in_a_sentence(run, port, started, asked, message):
    code, out, err = run(*ENGINE, port, *asked)
    assert (code, out, started) == (2, "", []) and message in err and err.count("\n") == 1


def test_without_vllm_it_says_how_to_install_it(run, port, monkeypatch):
    monkeypatch.setattr(versions, "packages_distributions", dict)
    code, out, err = run(*ENGINE, port)
    assert (code, out) == (2, "") and "vLLM is not installed" in err and "pip install 'vllm>=" in err
