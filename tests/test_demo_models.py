"""The chat's models: shared by visitors, changed without waiting for others, freed with the last visitor."""

import gc
import shutil
import threading
import weakref

import pytest
from asking import PITOME, ask

from pitome_mllm_demo import models as demo_models
from pitome_mllm_demo.models import Models
from pitome_mllm_demo.session import Conversation
from pitome_mllm_demo.visitors import Visitors

QUESTION = "what colour is the star"


def test_another_model(models, wordy, files, photo):
    chat, told = Conversation(models), []
    ask(chat, "is there a star?", files[:1])
    chat.use(wordy, None, lambda share, text: told.append((share, text)))
    assert chat.turns == [] and chat.engine.name == wordy
    assert [share for share, _ in told] == sorted(share for share, _ in told) and told[-1] == (1.0, f"{wordy} is ready")
    assert any("loading the weights" in text for _, text in told)
    assert ask(chat, QUESTION, [photo]).replies["merged"].model == wordy
    chat.leave()
    assert list(models.loaded) == [("tiny", None)]


def test_a_model_that_cannot_be_loaded_leaves_the_old_one(models, tmp_path):
    chat = Conversation(models)
    for name, bits, message in [
        ("nobody/nothing", None, "cannot load 'nobody/nothing'"),
        (str(tmp_path), None, "has no config.json"),
        ("", None, "the model's name is empty"),
        ("tiny", 3, "choose 4 or 8"),
    ]:
        with pytest.raises(ValueError, match=message):
            chat.use(name, bits)
    assert chat.engine.name == "tiny" and not chat.busy


def test_quantised_weights_are_another_model(models, files):
    chat = Conversation(models)
    chat.use("tiny", 8)
    assert chat.engine.name == "tiny (8 bit)"
    assert ask(chat, "is there a star?", files[:1]).replies["merged"].text in ("yes", "no")
    chat.leave()


def test_visitors_share_a_model_and_the_last_one_frees_it(models, wordy, photo):
    """At once: while collections are off, which would free it some day."""
    first, second = Conversation(models), Conversation(models)
    first.use(wordy)
    second.use(wordy)
    ask(first, QUESTION, [photo], compare=True)
    assert first.engine is second.engine
    gone, engine = weakref.ref(first.engine.model), first.engine
    first.leave()
    assert engine.key in models.loaded and ask(second, QUESTION, [photo]).replies["merged"].state == "done"
    gc.disable()
    try:
        second.leave()
        second.leave()
        assert gone() is None and engine.key not in models.loaded
    finally:
        gc.enable()


def test_the_old_model_makes_room_before_the_new_one_is_loaded(models, wordy, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(wordy, other)
    chat, alive = Conversation(models), []
    chat.use(wordy)
    old, load = weakref.ref(chat.engine.model), demo_models.load

    def noted(*args, **options):
        alive.append(old() is not None)
        return load(*args, **options)

    monkeypatch.setattr(demo_models, "load", noted)
    chat.use(str(other))
    assert alive == [False] and chat.engine.name == str(other)
    chat.leave()


def test_where_the_new_model_fails_late_the_old_one_is_loaded_again(models, wordy, photo, tmp_path):
    """Its configuration is fine, its weights are not."""
    broken = tmp_path / "broken"
    shutil.copytree(wordy, broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])
    chat = Conversation(models)
    chat.use(wordy)
    ask(chat, QUESTION, [photo])
    with pytest.raises(ValueError, match="cannot read the weights"):
        chat.use(str(broken))
    assert chat.engine.name == wordy and len(chat.turns) == 1 and not chat.busy
    assert ask(chat, QUESTION).replies["merged"].state == "done"
    chat.leave()
    assert list(models.loaded) == [models.first]


def test_where_neither_can_be_loaded_the_first_one_stays(models, wordy, photo, tmp_path, caplog):
    old, broken = tmp_path / "old", tmp_path / "broken"
    for folder in (old, broken):
        shutil.copytree(wordy, folder)
    (broken / "model.safetensors").write_bytes(b"")
    chat = Conversation(models)
    chat.use(str(old))
    shutil.rmtree(old)
    with pytest.raises(ValueError, match="broken"):
        chat.use(str(broken))
    assert chat.engine.key == models.first and "could not be loaded again" in caplog.text
    assert ask(chat, "is there a star?", [photo]).replies["merged"].state == "done"


def test_leaving_while_an_answer_is_written_ends_it_first(models, wordy, photo):
    chat, states = Conversation(models), []
    chat.use(wordy)
    engine = chat.engine
    for turn in chat.ask(QUESTION, [photo], PITOME, compare=True):
        states.append(turn.replies["plain"].state)
        if states[-1] == "writing" and engine.key in models.loaded:
            chat.leave()
    assert turn.replies["merged"].state == turn.replies["plain"].state == "stopped"
    assert engine.key not in models.loaded and not hasattr(engine, "model")
    with pytest.raises(ValueError, match="this conversation has ended"):
        ask(chat, QUESTION, [photo])


class SlowModels(Models):
    """Loading of all but the first model waits for `gate`."""

    def __init__(self):
        super().__init__()
        self.gate, self.begun = threading.Event(), threading.Event()

    def _load(self, key, say):
        if key != self.first:
            self.begun.set()
            assert self.gate.wait(60)
        return super()._load(key, say)


def test_nobody_else_waits_while_a_model_is_loaded(wordy, files):
    models = SlowModels()
    visitors = Visitors(models)
    loading = threading.Thread(target=lambda: visitors.of("a").use(wordy))
    visitors.of("b")
    loading.start()
    assert models.begun.wait(30)
    answers = []

    def come():
        answers.append(ask(visitors.of("b"), "is there a star?", files[:1]))
        answers.append(ask(visitors.of("c"), "is there a star?", files[:1]))
        visitors.of("c").use("tiny")
        visitors.leave("c")

    coming = threading.Thread(target=come)
    coming.start()
    coming.join(30)
    assert not coming.is_alive() and loading.is_alive() and len(answers) == 2
    models.gate.set()
    loading.join(60)
    assert visitors.of("a").engine.name == wordy
    visitors.leave("a")


def test_a_first_model_that_loads_slowly_holds_up_nobody_who_has_one(files):
    """Even the very first loading keeps only those waiting who need it, and it happens once."""
    models, loads = Models(), []
    gate, load = threading.Event(), models._load
    visitors = Visitors(models)
    models._load = lambda key, say: (loads.append(key), gate.wait(60), load(key, say))[-1]
    threads = [threading.Thread(target=visitors.of, args=[key]) for key in ("a", "a", "b")]
    for thread in threads:
        thread.start()
    leaving = threading.Thread(target=visitors.leave, args=["nobody"])
    leaving.start()
    leaving.join(10)
    assert not leaving.is_alive()
    gate.set()
    for thread in threads:
        thread.join(60)
    assert loads == [models.first] and sorted(visitors.conversations) == ["a", "b"]
    assert models.loaded[models.first].users == 2
