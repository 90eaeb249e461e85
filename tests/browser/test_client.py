"""The same chat without a browser: what gradio_client gets, from a server started as a user starts it."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gradio_client import Client, handle_file
from record import record

from pitome_mllm_eval.benchmark.sets import scene

OWN = "default"
SETTINGS = {
    "method": "pitome",
    "amount": "tokens",
    "keep": 144,
    "ratio": 0.9,
    "where": OWN,
    "merges": OWN,
    "published": False,
}
FIRST_ANSWER = 30  # seconds from the command to the first answer, with the embedded model on two cores


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """``pitome-mllm demo`` in a folder of its own: its address, its process, its folders."""
    cwd, temporary, home = (tmp_path_factory.mktemp(name) for name in ("cwd", "tmp", "home"))
    about = {"TMPDIR": str(temporary), "HOME": str(home), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(Path(sys.executable).with_name("pitome-mllm")), "demo"]
    process = subprocess.Popen(
        command, cwd=cwd, env={**os.environ, **about}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    process.began = time.monotonic()
    said = ""
    for line in process.stdout:
        said += line
        found = re.search(r"http://[\d.]+:\d+", line)
        if found:
            break
    else:
        raise AssertionError(f"the server ended: {said}")
    process.url, process.cwd, process.temporary, process.home = found[0], cwd, temporary, home
    yield process
    process.terminate()
    process.wait(120)


@pytest.fixture
def picture(tmp_path):
    scene(16)[0].save(tmp_path / "scene16.png")
    return handle_file(str(tmp_path / "scene16.png"))


def ask(client, question, picture=None, compare="nothing", **changed):
    values = {"question": question, "picture": picture, **SETTINGS, **changed}
    order = ["question", "picture", *SETTINGS]
    return client.predict(*(values[name] for name in order), compare, api_name="/ask")


def processor_seconds(process):
    """What a process has used of the processors so far."""
    user, system = Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def test_the_first_answer_comes_soon_after_a_cold_start(program, picture):
    """Held to processor time, since the clock on the wall depends on what else the machine does."""
    turn = ask(Client(program.url, verbose=False), scene(16)[1][0].text, picture)
    wall, used = time.monotonic() - program.began, processor_seconds(program)
    assert turn["replies"]["merged"]["answer"] == scene(16)[1][0].answer
    sys.stdout.write(
        f"\ncold start to first answer: {wall:.1f} s by the clock, {used:.1f} s of processor time, load average "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n"
    )
    assert used < FIRST_ANSWER
    record(
        "test-browser",
        cold_start_to_first_answer=f"{wall:.1f} s",
        processor_time_of_it=f"{used:.1f} s",
    )


def test_it_listens_on_this_machine_only(program):
    assert program.url.startswith("http://127.0.0.1:")


def test_turns_settings_and_figures(program, picture):
    client = Client(program.url, verbose=False)
    first = ask(client, "is there a star?", picture, compare="plain")
    second = ask(client, "is there a circle?", method="tome", keep=72, where="projector")
    assert first["replies"]["plain"]["figures"]["visual_tokens"] == 576
    merged = second["replies"]["merged"]
    assert (
        merged["label"] == "tome · 72 of 576 tokens (12%) · after the vision tower"
        and merged["of_plain"]["visual_tokens"] == 0.125
    )
    told = client.predict(api_name="/conversation")
    assert [turn["question"] for turn in told["turns"]] == ["is there a star?", "is there a circle?"]
    assert told["turns"][0]["pictures"][0]["name"] == "scene16.png"


def test_the_answer_comes_in_pieces(program, picture):
    client = Client(program.url, verbose=False)
    job = client.submit("is there a star?", picture, *SETTINGS.values(), "nothing", api_name="/ask")
    assert [turn["replies"]["merged"]["state"] for turn in job][-1] == "done"
    assert job.outputs()[0]["replies"]["merged"]["state"] in ("waiting", "writing")


def test_two_clients_have_two_conversations(program, picture):
    one, other = Client(program.url, verbose=False), Client(program.url, verbose=False)
    ask(one, "is there a star?", picture)
    with pytest.raises(Exception, match="add a picture first"):
        ask(other, "is there a circle?")
    assert len(one.predict(api_name="/conversation")["turns"]) == 1


@pytest.mark.parametrize(
    "question, changed, message",
    [
        ("is there an elephant?", {}, "does not know"),
        ("is there a star?", {"keep": 577}, "577 tokens are not possible"),
        ("is there a star?", {"method": "pitome", "where": "projector", "amount": "ratio"}, "give keep"),
    ],
)
def test_mistakes_are_readable(program, picture, question, changed, message):
    with pytest.raises(Exception, match=message):
        ask(Client(program.url, verbose=False), question, picture, **changed)


def test_a_broken_file_is_refused_readably(program, tmp_path):
    scene(16)[0].save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:3000])
    with pytest.raises(Exception, match="cannot read the picture 'broken.png': image file is truncated"):
        ask(Client(program.url, verbose=False), "is there a star?", handle_file(str(tmp_path / "broken.png")))


def forged(path):
    """What a client would send to have a file of the server read that it never uploaded."""
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def test_files_of_this_machine_are_not_served_or_read(program):
    import httpx

    for path in ("/etc/passwd", str(Path(__file__))):
        assert httpx.get(f"{program.url}/gradio_api/file={path}").status_code in (403, 404)
        with pytest.raises(Exception):  # noqa: B017
            ask(
                Client(program.url, verbose=False),
                "is there a star?",
                {"path": path, "meta": {"_type": "gradio.FileData"}},
            )


def test_nothing_is_written_outside_the_temporary_folder(program):
    """The last test of this file: after all that went before."""
    assert not list(program.cwd.iterdir())
    written = [p for p in program.home.rglob("*") if p.is_file()]
    assert written == [], written
    (folder,) = [p for p in program.temporary.iterdir() if p.name.startswith("pitome-mllm-demo-")]
    assert {p.name for p in program.temporary.iterdir()} == {folder.name}
    program.terminate()
    program.wait(120)
    assert not folder.exists()
