"""The chat without a page: turns, streaming, stopping, comparing."""

import json
import re
import subprocess
import sys
import threading
from dataclasses import asdict

import pytest
import torch
from asking import PITOME, ask, said
from models import LONG

from pitome_mllm import METHODS, estimate, load
from pitome_mllm_demo import session
from pitome_mllm_demo.controls import KINDS, Controls, menu
from pitome_mllm_demo.engine import Engine
from pitome_mllm_demo.session import MAX_LOOKS, MAX_PICTURES, Conversation
from pitome_mllm_eval.benchmark.sets import scene

QUESTION = "what colour is the star"
QUARTER = "144 of 576 tokens (25%) · inside and after the vision tower"


@pytest.fixture(scope="module")
def wordy_engine(wordy):
    return Engine("wordy", *load(wordy))


# ---- asking ----------------------------------------------------------------------------------------------------------


def test_an_answer_is_that_of_the_command_line(chat, files, capsys):
    from pitome_mllm import cli

    question = scene(0)[1][0].text
    reply = ask(chat, question, files[:1]).replies["merged"]
    assert cli.main(["ask", "--method", "pitome", "--keep", "144", "--json", "--scene", "0", question]) == 0
    assert reply.text == json.loads(capsys.readouterr().out)["answer"] != ""
    assert reply.state == "done" and reply.label == f"pitome · {QUARTER}"


def test_words_appear_one_after_the_other(wordy_engine, photo):
    chat = Conversation(wordy_engine)
    texts = [turn.replies["merged"].text for turn in chat.ask(QUESTION, [photo], PITOME)]
    assert len({*texts}) > 5 and all(texts[-1].startswith(text.strip()) for text in texts)
    assert len(texts[-1].split()) == LONG


def test_several_turns_and_pictures_reach_the_model(engine, files, monkeypatch):
    chat, prompts = Conversation(engine), []
    generate, tokenizer = chat.engine.model.generate, chat.engine.processor.tokenizer

    def noted(**inputs):
        words = [i for i in inputs["input_ids"][0].tolist() if i != chat.engine.model.config.image_token_id]
        prompts.append((len(inputs["pixel_values"]), tokenizer.decode(words, skip_special_tokens=True).split()))
        return generate(**inputs)

    monkeypatch.setattr(chat.engine.model, "generate", noted)
    answers, expected = [], []
    for question, new in [
        ("is there a star?", files[:1]),
        ("is there a circle?", ()),
        ("is there a cross?", files[1:3]),
    ]:
        turn = ask(chat, question, new)
        expected += f"user: {question.replace('?', '')} assistant:".split()
        assert prompts[-1][1] == expected
        answers.append(turn.replies["merged"].text)
        expected.append(answers[-1])
    assert [pictures for pictures, _ in prompts] == [1, 1, 3]
    assert turn.replies["merged"].figures.visual_tokens == 3 * 144
    assert [look.name for look in turn.replies["merged"].looks] == ["scene0.png", "scene1.png", "scene2.png"]


def test_pictures_are_prepared_on_one_thread_whoever_asks(engine, files, monkeypatch):
    """Else every thread of a page keeps memory for it: visitors come and go, and memory grows."""
    where = []
    for name in ("open_upload", "encode"):
        work = getattr(session, name)
        noted = lambda *given, work=work: (where.append(threading.current_thread().name), work(*given))[1]  # noqa: E731
        monkeypatch.setattr(session, name, noted)
    chats = [Conversation(engine) for _ in range(3)]
    threads = [threading.Thread(target=ask, args=[chat, "is there a star?", files[:1]]) for chat in chats]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(where) == 6 and len({*where}) == 1
    for chat in chats:
        chat.leave()


def test_settings_hold_for_the_next_turn_and_earlier_turns_keep_their_label(chat, files):
    model, merges = chat.engine.model, []
    for controls in (
        PITOME,
        Controls("tome", keep=72, where="projector"),
        Controls("pitome", amount="ratio", ratio=0.9),
        Controls(),
        Controls("pitome", keep=144, merges="3"),
    ):
        turn = ask(chat, "is there a star?", files[:1] if not merges else (), controls)
        merges.append(turn.replies["merged"].looks[0].counts[-1])
    labels = [turn.replies["merged"].label for turn in chat.turns]
    assert labels[0] == f"pitome · {QUARTER}"
    assert labels[1] == "tome · 72 of 576 tokens (12%) · after the vision tower"
    assert labels[3] == f"pitome · {QUARTER}"
    expected = chat.engine.plan(Controls("pitome", amount="ratio")).keep
    assert merges == [144, 72, expected, 144, 144] and chat.engine.model is model


def test_a_conversation_that_does_not_fit_is_refused_before_anything_shows(chat, files):
    ask(chat, "is there a star?", files[:3])
    with pytest.raises(
        ValueError,
        match="1 new ones do not fit: .* shorten what is said, or keep fewer tokens",
    ):
        ask(chat, "is there a star?", files[3:4], Controls("pitome", keep=144))
    assert len(chat.turns) == 1
    fits = Controls("pitome", keep=144, published=True)  # counts what the LLM reads
    assert ask(chat, "is there a star?", files[3:4], fits).replies["merged"].state == "done"


def test_more_pictures_than_a_conversation_holds(chat, files):
    with pytest.raises(ValueError, match=f"holds {MAX_PICTURES} pictures"):
        ask(chat, "", files[:1] * (MAX_PICTURES + 1))


@pytest.mark.parametrize(
    "question, controls, message",
    [
        ("what colour is the elephant?", PITOME, "does not know 'elephant'"),
        ("what is <image>?", PITOME, "stands for the picture"),
        ("is there a star?", Controls("pitom"), "did you mean 'pitome'"),
        ("is there a star?", Controls("pitome", keep=0), "keep=0"),
        ("is there a star?", Controls("pitome", keep=577), "577"),
        ("is there a star?", Controls("pitome", amount="ratio", ratio=0.0), "ratio=0.0"),
        ("is there a star?", Controls("pitome", where="moon"), "unknown where 'moon'"),
        ("is there a star?", Controls("pitome", merges="few"), "merges='few' is not possible"),
        ("is there a star?", Controls("pitome", where="projector", merges=4), "no block merges"),
        ("is there a star?", Controls("dct", amount="much"), "unknown amount 'much'"),
    ],
)
def test_mistakes_are_one_readable_error_and_leave_no_trace(chat, files, question, controls, message):
    with pytest.raises(ValueError, match=message):
        ask(chat, question, files[:1], controls)
    assert chat.turns == [] and not chat.busy
    assert ask(chat, "is there a star?", files[:1]).replies["merged"].state == "done"


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"keep": 9999}, "9999 tokens are not possible; give a whole number from 1 to 576"),
        ({"keep": 0}, "0 tokens"), ({"keep": 1.5}, "1.5 tokens"), ({"keep": None}, "no number; give 1 to 576 tokens"),
        ({"keep": True}, "no number"), ({"amount": "ratio", "ratio": None}, "no number; give a ratio up to 1"),
    ],
)  # fmt: skip
def test_a_number_that_is_cleared_or_out_of_range_is_said_in_words(changed, message):
    given = {**asdict(Controls(keep=144)), **changed}
    with pytest.raises(ValueError, match=message):
        Controls.of(given, 576)
    assert Controls.of({**given, "amount": "tokens", "keep": 99.0}, 576).keep == 99


def test_the_menu_has_a_line_for_every_method_in_groups():
    lines = menu()
    assert sorted(name for _, name in lines) == sorted(METHODS)
    kinds = [re.match(r"[\w-]+ \((\w+)\): \w", line)[1] for line, _ in lines]
    assert kinds == sorted(kinds, key=KINDS.index) and {*kinds} == {*KINDS}


def test_a_first_question_needs_a_picture_and_a_turn_needs_something(chat, files):
    with pytest.raises(ValueError, match="add a picture first"):
        ask(chat, "is there a star?")
    ask(chat, "is there a star?", files[:1])
    with pytest.raises(ValueError, match="the question is empty"):
        ask(chat, "  ")


def test_a_picture_without_a_question_is_only_looked_at(chat, files):
    reply = ask(chat, "", files[:1], compare="plain").replies["merged"]
    assert reply.text == "" and reply.state == "done" and reply.looks[0].counts[-1] == 144
    assert reply.figures.tower_ms > 0 and reply.figures.prefill_ms is None
    assert ask(chat, "is there a star?").replies["merged"].text in ("yes", "no")


def test_a_run_that_fails_leaves_the_conversation_as_it_was(chat, files, monkeypatch):
    ask(chat, "is there a star?", files[:1])

    def fail(**_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(chat.engine.model, "generate", fail)
    with pytest.raises(ValueError, match="not enough memory for this; clear the conversation"):
        ask(chat, "is there a circle?")
    with pytest.raises(ValueError, match="not enough memory"):
        said(chat.retry(PITOME))
    assert [turn.question for turn in chat.turns] == ["is there a star?"] and not chat.busy


# ---- stop, retry, clear, JSON ----------------------------------------------------------------------------------------


def test_stop_keeps_what_there_is(wordy_engine, photo):
    chat = Conversation(wordy_engine)
    turn = None
    for turn in chat.ask(QUESTION, [photo], PITOME):
        if turn.replies["merged"].text:
            chat.stop()
    reply = turn.replies["merged"]
    assert reply.state == "stopped" and 1 <= len(reply.text.split()) < LONG
    assert ask(chat, QUESTION).replies["merged"].state == "done"  # a stop does not last


def test_stop_while_waiting_for_others(wordy_engine, photo):
    chat, gate = Conversation(wordy_engine), threading.Event()
    chat.engine.submit(lambda: gate.wait(60))
    states = []
    for turn in chat.ask(QUESTION, [photo], PITOME):
        states.append((turn.replies["merged"].state, turn.replies["merged"].ahead))
        if turn.replies["merged"].ahead:
            chat.stop()
    gate.set()
    assert ("waiting", 1) in states and states[-1][0] == "stopped"  # while the other one goes on
    assert not chat.busy and chat.turns[0].replies["merged"].text == ""


def test_a_caller_that_goes_away_ends_the_run(wordy_engine, photo):
    chat = Conversation(wordy_engine)
    events = chat.ask(QUESTION, [photo], PITOME)
    while not next(events).replies["merged"].text:
        pass
    events.close()
    assert chat.turns[0].replies["merged"].state == "stopped" and not chat.busy
    assert ask(chat, QUESTION).replies["merged"].state == "done"


def test_one_answer_at_a_time(wordy_engine, photo):
    chat = Conversation(wordy_engine)
    events = chat.ask(QUESTION, [photo], PITOME)
    next(events)
    for call in (lambda: ask(chat, QUESTION), lambda: said(chat.retry(PITOME))):
        with pytest.raises(ValueError, match="still being written"):
            call()
    assert said(events).replies["merged"].state == "done"


def test_retry_asks_again_with_other_settings(chat, files):
    ask(chat, "is there a star?", files[:1])
    ask(chat, "is there a circle?")
    turn = said(chat.retry(Controls("tome", keep=36), compare="plain"))
    assert [t.question for t in chat.turns] == ["is there a star?", "is there a circle?"] and chat.turns[-1] is turn
    assert turn.replies["merged"].label.startswith("tome · 36 of 576") and set(turn.replies) == {"plain", "merged"}
    chat.clear()
    with pytest.raises(ValueError, match="nothing to ask again"):
        said(chat.retry(PITOME))


def test_clear_while_an_answer_is_written(wordy_engine, photo):
    chat = Conversation(wordy_engine)
    for turn in chat.ask(QUESTION, [photo], PITOME):
        if turn.replies["merged"].text:
            chat.clear()
    assert chat.turns == [] and not chat.busy


def test_the_conversation_as_json(chat, files):
    ask(chat, "is there a star?", files[:1], compare="plain")
    told = json.loads(json.dumps(chat.to_dict()))
    assert told["model"] == "tiny"
    (turn,) = told["turns"]
    side = scene(0)[0].width
    assert turn["question"] == "is there a star?"
    assert turn["pictures"] == [{"name": "scene0.png", "width": side, "height": side}]
    merged = turn["replies"]["merged"]
    assert merged["settings"] == {
        "method": "pitome", "amount": "tokens", "keep": 144, "ratio": 0.9, "where": "default",
        "merges": "default", "published": False,
    }  # fmt: skip
    assert merged["answer"] in ("yes", "no") and merged["figures"]["visual_tokens"] == 144
    assert merged["of_plain"]["visual_tokens"] == 0.25 and turn["replies"]["plain"]["settings"] is None


def test_a_new_conversation_ends_and_forgets_the_one_before(wordy_engine, engine, files, photo):
    """As an example starts it: no picture of before comes along, and an answer that is being written ends."""
    chat = Conversation(engine)
    for path in files[:3]:
        turn = said(chat.ask("is there a star?", [path], PITOME, anew=True))
        assert [len(t.pictures) for t in chat.turns] == [1] and turn.replies["merged"].figures.visual_tokens == 144
    chat = Conversation(wordy_engine)
    events = chat.ask(QUESTION, [photo], PITOME)
    while not next(events).replies["merged"].text:
        pass
    rest = threading.Thread(target=said, args=[events])
    rest.start()
    turn = said(chat.ask("what shape is the thing", [photo], PITOME, anew=True))
    rest.join()
    assert chat.turns == [turn] and turn.replies["merged"].state == "done"


def test_the_card_says_how_many_pictures_there_are(chat, files):
    ask(chat, "is there a star?", files[:1])
    labels = [ask(chat, question, files[1:2]).replies["merged"].label for question in ("is there a circle?", "")]
    assert labels == [f"pitome · 2 pictures × {QUARTER}", f"pitome · {QUARTER}"]


def test_two_methods_side_by_side(chat, files):
    turn = ask(chat, "is there a star?", files[:1], PITOME, compare="tome")
    assert [reply.label.split(" · ")[0] for reply in turn.replies.values()] == ["tome", "pitome"]
    for reply in turn.replies.values():
        assert reply.figures.visual_tokens == 144 and reply.plain.visual_tokens == 576 and len(reply.looks) == 1
    assert [*ask(chat, "", files[1:2], PITOME, compare="tome").replies] == ["other", "merged"]
    with pytest.raises(ValueError, match="did you mean 'tome'"):
        ask(chat, "is there a star?", compare="tom")


def test_a_preview_is_one_pass_of_the_tower_outside_of_the_conversation(chat, files, monkeypatch):
    ask(chat, "is there a star?", files[:1])
    picture, passes = chat.turns[0].pictures[0], []
    hook = chat.engine.handle.tower.register_forward_pre_hook(lambda *_: passes.append(1))
    monkeypatch.setattr(chat.engine.model, "generate", None)
    looks = [chat.preview(picture, Controls("pitome", keep=keep)) for keep in (144, 72)]
    hook.remove()
    assert [look.counts[-1] for look in looks] == [144, 72] and len(passes) == 2 and len(chat.turns) == 1
    assert looks[0].groups.tolist() == chat.turns[0].replies["merged"].looks[0].groups.tolist()


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_compare_gives_both_answers_and_their_figures(chat, files):
    turn = ask(chat, "is there a star?", files[:1], Controls("pitome", keep=72), compare="plain")
    plain, merged = turn.replies["plain"], turn.replies["merged"]
    assert plain.label == "plain · all 576 tokens" and plain.looks == () and merged.plain is plain.figures
    assert (plain.figures.visual_tokens, merged.figures.visual_tokens) == (576, 72)
    assert plain.figures.prompt_tokens - merged.figures.prompt_tokens == 504
    for figures in (plain.figures, merged.figures):
        assert 0 < figures.tower_ms < figures.prefill_ms and (figures.per_token_ms or 1) > 0
    shares = merged.figures.over(merged.plain)
    assert set(shares) >= {*asdict(merged.figures)} - {"per_token_ms"} and shares["visual_tokens"] == 0.125
    assert 0 < shares["gflops"] < 1 and 0 < shares["kv_cache_mb"] < 0.2


@pytest.mark.parametrize("controls", [None, PITOME, Controls(), Controls("tome", amount="ratio", ratio=0.95)])
@pytest.mark.parametrize("pictures", [1, 3])
def test_calculated_figures_are_those_of_estimate(engine, controls, pictures):
    keep = engine.available if controls is None else engine.plan(controls).keep
    kv, gflops = engine.cost(controls, pictures, pictures * keep + 17)
    settings = {} if controls is None else controls.settings()
    cost = estimate(engine.model, **settings, images=pictures, text_tokens=17, new_tokens=1)
    assert kv * 1e6 == pytest.approx(cost.kv_bytes) and gflops * 1e9 == pytest.approx(cost.flops)


def test_a_plain_run_in_between_is_really_plain(chat, files):
    """The plain lane remembers the plain answers, and merging holds again after it."""
    ask(chat, "is there a star?", files[:1], compare="plain")
    turn = ask(chat, "is there a circle?", compare="plain")
    assert turn.replies["plain"].figures.visual_tokens == 576
    assert turn.replies["merged"].looks[0].counts[-1] == 144


def test_only_recent_turns_keep_what_is_inside(chat, files):
    ask(chat, "", files[:1])
    for _ in range(MAX_LOOKS):
        ask(chat, "is there a star?")
    assert chat.turns[0].replies["merged"].looks == ()
    assert all(turn.replies["merged"].looks for turn in chat.turns[1:])


def test_the_session_needs_no_gradio():
    code = "import sys; sys.modules['gradio'] = None; import pitome_mllm_demo.session"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
