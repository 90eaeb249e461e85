"""The command line as a user meets it: answers, tables, pictures, and one clear line for every mistake."""

import json
import re
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from checks import command_line
from models import QUESTION, build
from models import picture as textured
from models import processor as plain_processor
from PIL import Image

from pitome_mllm import METHODS, __version__, attach, cli
from pitome_mllm.commands import _options
from pitome_mllm.commands.groups import drawing
from pitome_mllm.costs.flops import MLP_MATRICES
from pitome_mllm.settings import DEFAULT_METHOD

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("ask", "demo", "serve", "groups", "spectrum", "cost", "bench", "reproduce", "methods")


@pytest.fixture
def run(capsys):
    """Run a command line; returns the exit code, stdout and stderr."""
    return partial(command_line, capsys)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "photo.png"
    textured(0).save(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model with random weights whose processor has no chat template."""
    path = tmp_path_factory.mktemp("checkpoint")
    build().save_pretrained(path)
    plain_processor().save_pretrained(path)
    return path


def scene(number=0):
    from pitome_mllm_eval.benchmark.sets import scene

    return scene(number, split="test")


# ---- ask -------------------------------------------------------------------------------------------------------------


def test_ask_without_anything_answers_scene_0(run):
    code, out, err = run("ask")
    question = scene()[1][0]
    first, answer, truth = out.splitlines()
    assert (code, err) == (0, "")
    assert first == f"test scene 0: {question.text}"
    assert re.fullmatch(r"merged, 144 of 576 visual tokens: \S.*", answer)
    assert truth == f"true answer: {question.answer}"


def test_ask_a_question_about_a_scene(run):
    _, questions = scene(3)
    code, out, _ = run("ask", "--scene", 3, questions[1].text.upper(), "--keep", 72)
    assert code == 0 and "merged, 72 of 576 visual tokens: " in out
    assert out.endswith(f"true answer: {questions[1].answer}\n")
    code, out, _ = run("ask", "--scene", 3, "is there a star above the star above the star?")
    assert code == 0 and "true answer" not in out


def test_ask_about_a_picture(run, photo):
    code, out, err = run("ask", photo, "what colour is the star?", "--ratio", 0.9, "--method", "tome")
    assert (code, err) == (0, "")
    assert out.startswith(f"{photo}: what colour is the star?\nmerged, ") and "true answer" not in out


def test_compare_shows_both_side_by_side(run):
    code, out, _ = run("ask", "--compare", "--keep", 144, "--repeats", 1)
    assert code == 0
    assert "plain, 576 of 576 visual tokens: " in out and "merged, 144 of 576 visual tokens: " in out
    for row in ("answer", "visual tokens", "LLM prompt length", "vision tower, ms", "prefill with tower, ms"):
        assert row in out
    for row in ("each new token, ms", "KV cache, MB", "GFLOPs", "ratio", "wall clock on this device", "true answer"):
        assert row in out
    assert re.search(r"visual tokens\W+576\W+144\W+0\.25", out)


def test_compare_with_an_llm_of_unknown_flops_shows_the_rest(run, monkeypatch):
    known = json.loads(run("ask", "--compare", "--json", "--repeats", 1)[1])["runs"]
    for llm in list(MLP_MATRICES):
        monkeypatch.delitem(MLP_MATRICES, llm)
    code, out, err = run("ask", "--compare", "--repeats", 1)
    assert (code, err) == (0, "") and "true answer" in out
    assert re.search(r"GFLOPs\W+unknown\W+unknown\W+\n", out) and re.search(r"KV cache, MB\W+\d", out)
    unknown = json.loads(run("ask", "--compare", "--json", "--repeats", 1)[1])["runs"]
    for mode in ("plain", "merged"):
        assert "gflops" in known[mode] and "gflops" not in unknown[mode]
        assert unknown[mode]["kv_cache_mb"] == known[mode]["kv_cache_mb"]
        assert set(known[mode]) - set(unknown[mode]) == {"gflops"}


def test_the_table_says_what_its_costs_are_for(run):
    out = " ".join(run("ask", "--compare", "--repeats", 1)[1].split())
    assert "from the picture to new token 8. KV cache: calculated, for the prompt and 7 new tokens" in out
    tower, large, saved = re.search(
        r"What decides: .* The tower has (\d+)% .* LLaVA-1.5-7B it has (\d+)%.* leaves (0.\d\d) of all", out
    ).groups()
    assert int(tower) > 2 * int(large) and 0.2 < float(saved) < 0.5  # a quarter of the tokens, where the LLM is large


def test_json_is_one_object_and_nothing_else(run):
    code, out, err = run("ask", "--compare", "--json", "--repeats", 1)
    said = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert said["question"] == scene()[1][0].text and said["true_answer"] == scene()[1][0].answer
    assert said["method"] == DEFAULT_METHOD and said["model"] == "tiny" and said["keep"] == 144
    plain, merged = said["runs"]["plain"], said["runs"]["merged"]
    assert said["answer"] == merged["answer"]
    assert plain["visual_tokens"] == 576 and merged["visual_tokens"] == 144
    assert plain["prompt_tokens"] - merged["prompt_tokens"] == 432
    assert merged["gflops"] < plain["gflops"] and merged["kv_cache_mb"] < plain["kv_cache_mb"]
    assert all(r[name] > 0 for r in (plain, merged) for name in ("tower_ms", "prefill_ms", "per_token_ms"))


def test_json_without_compare_has_no_figures_that_were_not_measured(run):
    said = json.loads(run("ask", "--json", "--keep", 0.125)[1])
    assert set(said["runs"]) == {"merged"}
    assert set(said["runs"]["merged"]) == {"answer", "visual_tokens", "prompt_tokens"}
    assert said["runs"]["merged"]["visual_tokens"] == said["keep"] == 72


def test_the_answer_streams(run, checkpoint, photo, monkeypatch):
    pieces = []
    monkeypatch.setattr(sys.stdout, "write", lambda text: pieces.append(text) or len(text))
    arguments = ["ask", photo, "what shape is in the picture", "--model", checkpoint, "--max-new-tokens", 6]
    assert run(*arguments)[0] == 0
    after = pieces[next(i for i, text in enumerate(pieces) if text.startswith("merged, ")) + 1 :]
    assert len([text for text in after if text.strip()]) >= 3, pieces


def test_another_model_gets_the_llava_prompt(run, checkpoint, photo):
    code, out, _ = run("ask", photo, "what shape is in the picture", "--model", checkpoint, "--where", "projector")
    assert code == 0 and "merged, 144 of 576 visual tokens" in out


def test_ask_with_quantised_weights(run):
    code, out, _ = run("ask", "--bits", 8)
    assert code == 0 and "merged, 144 of 576" in out


# ---- groups, methods, help -------------------------------------------------------------------------------------------


def test_groups_draws_one_panel_for_each_method(run, tmp_path, photo):
    code, out, _ = run("groups", photo, "--method", "pitome", "tome", "--keep", 72, "--out", tmp_path / "g.png")
    assert code == 0 and "pitome: 72 of 576 tokens; tome: 72 of 576 tokens" in out
    with Image.open(tmp_path / "g.png") as drawn:
        assert drawn.width > 2.5 * drawn.height > 500
    code, out, _ = run("groups", "--scene", 2, "--style", "mean", "--side", 336, "--out", tmp_path / "one.jpg")
    assert code == 0 and out.startswith(str(tmp_path / "one.jpg")) and (tmp_path / "one.jpg").is_file()


def test_groups_leaves_out_a_class_token_that_the_llm_sees(run, tmp_path, photo):
    """With feature selection "full" the first of 577 labels is that of the class token."""
    build(strategy="full").save_pretrained(tmp_path / "full")
    plain_processor(strategy="full").save_pretrained(tmp_path / "full")
    for method in ("pitome", "random"):
        out = tmp_path / f"{method}.png"
        code, said, err = run("groups", photo, "--model", tmp_path / "full", "--method", method, "--out", out)
        assert (code, err) == (0, "") and f"{method}: 144 of 577 tokens" in said
        assert out.is_file()


def test_the_drawing_numbers_the_groups_of_patches_only(monkeypatch):
    drawn = {}
    monkeypatch.setattr("pitome_mllm.visualize.run.draw_groups", lambda _, groups, **__: drawn.update(groups=groups))
    model = build(strategy="full")
    process = plain_processor(strategy="full")
    inputs = process(images=textured(0), text=QUESTION, return_tensors="pt")
    with attach(model, "pitome", keep=144) as handle:
        model.generate(**inputs, max_new_tokens=1)
        drawing(process, textured(0), handle.stats)
        sizes = handle.stats.sizes[0, 1:]
    groups = drawn["groups"]
    assert groups.shape == (576,) and torch.equal(groups.unique(), torch.arange(143))
    assert torch.equal(groups.bincount().float(), sizes)


def test_groups_draws_energies_steps_and_a_chart(run, tmp_path):
    out = tmp_path / "g.png"
    sheets = {}
    for name, options in {"energy": ["--energy"], "steps": ["--steps"], "both": ["--energy", "--steps"]}.items():
        line = ["--method", "pitome", "--where", "tower", "--side", 96, "--out", out, *options]
        code, said, err = run("groups", *line)
        assert (code, err) == (0, "") and "pitome: 144 of 576 tokens" in said
        with Image.open(out) as drawn:
            sheets[name] = drawn.size
    assert sheets["steps"][0] == sheets["energy"][0] == 4 * 96 + 5 * 16  # picture, six merges (and the chart): two rows
    assert sheets["energy"][1] > sheets["steps"][1] > 2 * 96  # colour bars
    code, out, err = run("groups", "--energy", "--method", "tome", "--out", tmp_path / "t.png")
    assert (code, out) == (2, "") and "tome has no energies, so there is nothing to draw" in err


def test_groups_stacks_the_steps_of_several_methods(run, tmp_path):
    heights = []
    for methods in (["tome"], ["tome", "mctf"]):
        run("groups", "--steps", "--side", 96, "--style", "size", "--out", tmp_path / "g.png", "--method", *methods)
        with Image.open(tmp_path / "g.png") as drawn:
            heights.append(drawn.height)
    assert heights[1] > 1.8 * heights[0]


def test_methods_lists_every_method(run):
    code, out, _ = run("methods")
    assert code == 0 and all(name in out for name in METHODS) and f"{DEFAULT_METHOD} (default)" in out
    assert METHODS["tome"].reference.split()[-1] in out  # in the column's next line, where it is narrow


def test_version_and_help(run):
    assert run("--version") == (0, f"pitome-mllm {__version__}\n", "")
    code, out, _ = run("--help")
    assert code == 0 and all(command in out for command in COMMANDS)
    for command in COMMANDS:
        assert run(command, "--help")[0] == 0


def test_without_its_packages_serve_says_how_to_get_them(run, monkeypatch):
    monkeypatch.setattr("pitome_mllm.commands.serve.PACKAGES", ("starlette", "no_such_server"))
    code, out, err = run("serve", "--port", 8642)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "serving needs starlette, no_such_server; in a checkout of pitome-mllm: pip install '.[serve]'" in err


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "pitome_mllm.cli", "ask", "nothing.png", "what is there"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "pitome-mllm: no picture file 'nothing.png'\n"


# ---- mistakes: one line on stderr, exit code 2 -----------------------------------------------------------------------

MISTAKES = [
    ([], "COMMAND"),
    (["dance"], "invalid choice: 'dance'"),
    (["ask", "--keep", "144", "--ratio", "0.9"], "not allowed with argument"),
    (["ask", "--keep", "many"], "'many' is neither a number of tokens nor a share such as 0.25"),
    (["ask", "--keep", "577"], "577"),
    (["ask", "--keep", "0"], "0"),
    (["ask", "--keep", "-3"], "-3"),
    (["ask", "--keep", "1.5"], "1.5"),
    (["ask", "--ratio", "2"], "ratio=2.0 is not possible"),
    (["ask", "--method", "pitom"], "unknown method 'pitom'; did you mean 'pitome'? Choices: pitome, "),
    (["ask", "--where", "kitchen"], "unknown where 'kitchen'; choose one of 'tower', 'projector', 'both'"),
    (["ask", "--where", "both", "--ratio", "0.9"], "ratio"),
    (["ask", "--merges", "0"], "merges=0 is not possible"),
    (["ask", "--merges", "some"], "merges='some' is not possible"),
    (["ask", "--merges", "4", "--ratio", "0.9"], "ratio says what every block removes"),
    (["ask", "--scene", "100000"], "scene 100000 does not exist"),
    (["ask", "--scene", "-1"], "scene -1 does not exist"),
    (["ask", "nowhere.png", "what is there"], "no picture file 'nowhere.png'"),
    (["ask", "what colour is the star?"], "to ask about a scene: pitome-mllm ask --scene 0 'what colour is the star?'"),
    (["ask", "a.png", "what is there", "--scene", "0"], "got the picture 'a.png' and --scene 0; give one of them"),
    (
        ["ask", "--scene", "0", "what colour is the old elephant?"],
        "the model does not know 'old', 'elephant'; the embedded model answers one-word questions about",
    ),
    (
        ["ask", "--scene", "0", "what is this?"],
        "such as 'what shape is in the bottom left?', 'is there a green triangle?'",
    ),
    (["serve", "--port", "99999"], "'99999' is not a port; give a number from 1 to 65535"),
    (["demo", "--port", "99999"], "'99999' is not a port; give a number from 1 to 65535"),
    (["groups", "--side", "100000"], "side=100000 is more than 4096 pixels"),
    (["ask", "--scene", "0", "what is <image>?"], "'<image>', which stands for the picture"),
    (["ask", "--scene", "0", "  "], "the question is empty"),
    (["ask", "--scene", "0", "what " * 3000], "do not fit: the model holds 2048; shorten what is said"),
    (["ask", "--max-new-tokens", "0"], "argument --max-new-tokens: 0 is not possible; give 1 or more"),
    (["ask", "--repeats", "-1"], "argument --repeats: -1 is not possible"),
    (["ask", "--bits", "3"], "bits=3 is not possible; choose 4 or 8"),
    (["ask", "--dtype", "int8"], "dtype='int8' is not possible"),
    (["ask", "--device", "toaster"], "device='toaster' is not a device"),
    (["ask", "--model", "./nowhere"], "no folder 'nowhere'"),
    (["ask", "--model", "nobody/nothing"], "cannot load 'nobody/nothing'"),
    (["groups", "--out", "groups.xyz"], "'groups.xyz' does not end like a picture file"),
    (["groups", "--out", "nowhere/groups.png"], "no folder 'nowhere' to write 'groups.png' into"),
    (["ask", "--max-new-tokens", "100000"], "do not fit: the model holds 2048; ask for at most 1"),
    (["groups", "a.png", "--scene", "0"], "got the picture 'a.png' and --scene 0; give one of them"),
    (["groups", "--method", "pitome", "tom"], "unknown method 'tom'; did you mean"),
    (["groups", "--style", "baroque"], "unknown style 'baroque'"),
    (["groups", "--side", "3"], "3"),
    (["groups", "--method", "dct"], "dct forms no groups, so there is nothing to draw"),
    (["groups", "--energy", "--style", "mean"], "not allowed with argument"),
]


@pytest.mark.parametrize(
    "arguments, message", MISTAKES, ids=[" ".join(arguments)[:60] or "nothing" for arguments, _ in MISTAKES]
)
def test_a_mistake_is_one_line_and_code_2(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert code == 2 and out == ""
    assert message in err and err.startswith("pitome-mllm") and err.count("\n") == 1, err
    assert "Traceback" not in err and not list(tmp_path.iterdir())


def test_a_picture_needs_a_question(run, photo):
    code, out, err = run("ask", photo)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "a picture needs a question" in err and "--model" in err and len(asked := re.findall(r"'([^']+)'", err)) == 3
    for question in asked:  # what it recommends works
        assert run("ask", photo, question)[0] == 0


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n and no more"])
def test_files_that_are_no_pictures(run, tmp_path, content):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    code, out, err = run("ask", path, "what is there")
    assert (code, out) == (2, "") and "bad.png" in err and err.count("\n") == 1


def test_a_truncated_picture(run, tmp_path):
    textured(1).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    code, out, err = run("ask", tmp_path / "half.jpg", "what is there")
    assert (code, out) == (2, "") and "cannot read the picture" in err and err.count("\n") == 1


@pytest.mark.parametrize("line", [["methods"], ["--help"]], ids=" ".join)
def test_a_full_disk_is_one_line(line):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "pitome_mllm.cli", *line], stdout=full, stderr=-1, text=True)
    assert (done.returncode, done.stderr) == (1, "pitome-mllm: cannot write: No space left on device\n")


@pytest.mark.parametrize("swallowed", [False, True])
def test_help_imports_no_torch_and_an_interrupt_of_imports_is_quiet(swallowed):
    """Some imports swallow the interrupt, and what they left undone fails later."""
    code = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the shell had these tests ignore it
from pitome_mllm import cli
class Interrupt:
    def find_spec(self, name, *_):
        if name in ("torch", "transformers"):
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                if not {swallowed}:
                    raise
            raise RecursionError
sys.meta_path.insert(0, Interrupt())
for line in ["--help"], ["serve", "--help"]:
    try:
        cli.main(line)
    except SystemExit:
        pass
sys.exit(cli.main(["ask"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "pitome-mllm: interrupted\n")
    assert "COMMAND" in done.stdout and "--allow-urls" in done.stdout


def test_progress_on_a_pipe_says_something(capsys, monkeypatch):
    monkeypatch.setattr(_options, "EVERY", 0.001)
    said = ""
    with _options.progress("Timing", total=9) as advance:
        advance()
        while "Timing: 1 of 9, " not in said:
            said += capsys.readouterr().err
    assert said.endswith(" s\n")


def test_a_taken_port_is_said_before_an_address(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, out, err = run("serve", "--port", taken.getsockname()[1])
    assert (code, out) == (2, "") and err.startswith("pitome-mllm: cannot listen on 127.0.0.1, port ")


def test_too_little_memory_is_one_line_with_advice(run, monkeypatch):
    def fail(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr("pitome_mllm.loading.load", fail)
    code, out, err = run("ask")
    assert (
        (code, out) == (1, "")
        and err.startswith("pitome-mllm: out of memory; choose --bits 4")
        and err.count("\n") == 1
    )


@pytest.mark.parametrize("error", [ValueError("shapes do not fit"), OSError("disk full")])
def test_what_is_no_mistake_of_the_user_shows_where_it_happened(run, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("pitome_mllm.commands.ask.generate", fail)
    with pytest.raises(type(error), match=str(error)):
        run("ask")


def test_commands_send_checkpoints_of_the_original_package_to_python(run, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]})
    )
    code, out, err = run("ask", "--model", tmp_path)
    assert (code, out) == (2, "") and "original llava package" in err and "in Python, pitome_mllm.load does" in err


def test_debug_shows_where_an_error_came_from():
    with pytest.raises(ValueError, match="no picture file"):
        cli.main(["--debug", "ask", "nowhere.png", "what is there"])
