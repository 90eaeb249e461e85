"""Visitors of the chat: never mixed, never in each other's way, and what they hold is freed when they leave."""

import gc
import queue
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
from asking import ask

from pitome_mllm_demo.controls import Controls
from pitome_mllm_demo.session import Conversation
from pitome_mllm_demo.visitors import Visitors
from pitome_mllm_eval.benchmark.sets import scene


def test_a_visitor_who_leaves_frees_what_they_hold(engine, files):
    visitors = Visitors(engine)
    chat = visitors.of("a")
    assert visitors.of("a") is chat and visitors.of("b") is not chat
    turn = ask(chat, "is there a star?", files[:1])
    held = [weakref.ref(turn.pictures[0].image), weakref.ref(turn.replies["merged"].looks[0])]
    visitors.leave("a")
    visitors.leave("nobody")
    assert list(visitors.conversations) == ["b"]
    del chat, turn
    gc.collect()
    assert [ref() for ref in held] == [None, None]
    assert visitors.of("a").turns == []


def test_a_visitor_who_was_away_for_long_counts_as_gone(engine, files):
    visitors = Visitors(engine, idle=100)
    ask(visitors.of("a"), "is there a star?", files[:1])
    visitors.of("a").seen -= 101
    visitors.of("b")
    assert list(visitors.conversations) == ["b"]


def test_who_was_away_is_let_go_though_nobody_comes(engine, files, monkeypatch):
    slept, left, nap = [], queue.Queue(), threading.Semaphore(1)
    clock = SimpleNamespace(sleep=lambda every: (slept.append(every), nap.acquire()), monotonic=time.monotonic)
    monkeypatch.setattr("pitome_mllm_demo.visitors.time", clock)
    visitors = Visitors(engine, idle=100)
    monkeypatch.setattr(Conversation, "leave", lambda chat, leave=Conversation.leave: (leave(chat), left.put(chat)))
    chat = visitors.of("a")
    ask(chat, "is there a star?", files[:1])
    chat.seen -= 101
    visitors.watch(every=7)
    assert left.get(timeout=60) is chat and visitors.conversations == {} and chat.turns == [] and slept[0] == 7


def test_there_is_room_for_so_many_visitors(engine):
    visitors = Visitors(engine, most=2)
    visitors.of("a")
    visitors.of("b")
    with pytest.raises(ValueError, match="2 visitors are here, and there is no room for more; come back later"):
        visitors.of("c")
    assert visitors.of("a") is visitors.conversations["a"]
    visitors.leave("a")
    assert visitors.of("c").turns == []


def test_visitors_at_once_never_mix(engine, files):
    """Each thread has its own picture, settings and answers; all of them as when alone."""
    questions = [q.text for q in scene(0)[1][:3]]
    settings = [
        Controls("pitome", keep=144), Controls("tome", keep=36), Controls(keep=288), Controls("random", keep=16),
    ]  # fmt: skip

    def answers(number):
        chat = Conversation(engine)
        turns = [
            ask(chat, question, files[number : number + 1] if not turn else (), settings[number])
            for turn, question in enumerate(questions)
        ]
        replies = [turn.replies["merged"] for turn in turns]
        names = {look.name for reply in replies for look in reply.looks}
        groups = [reply.looks[0].groups.tolist() for reply in replies]
        return [reply.text for reply in replies], [reply.label for reply in replies], names, groups

    alone, together = [answers(number) for number in range(4)], [None] * 4

    def visit(number):
        together[number] = answers(number)

    threads = [threading.Thread(target=visit, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert [names for _, _, names, _ in together] == [{f"scene{number}.png"} for number in range(4)]
