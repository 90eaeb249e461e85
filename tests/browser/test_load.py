"""Eight visitors at once for two minutes: no error, no answer to another's question, and no growing memory.

Run by `make test-load`; PITOME_LOAD_SECONDS changes how long.
"""

import os
import random
import sys
import threading
import time
from pathlib import Path

import pytest
from gradio_client import Client, handle_file
from record import record
from test_client import OWN, program  # noqa: F401, the server as a user starts it

from pitome_mllm_eval.benchmark.sets import scene

VISITORS = 8
SECONDS = float(os.environ.get("PITOME_LOAD_SECONDS", 120))
GROWTH = 1.05
SETTINGS = [("pitome", 144), ("tome", 72), ("pitome", 288), ("random", 16)]

pytestmark = pytest.mark.load


def resident(process):
    """Megabytes of memory that a process holds."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Guest:
    """A visitor with a picture and settings of their own, who comes, asks a few times, and leaves, again and again."""

    def __init__(self, url, number, folder):
        self.url, self.number, self.random = url, number, random.Random(number)
        self.path = folder / f"guest{number}.png"
        picture, self.questions = scene(number)
        picture.save(self.path)
        self.method, self.keep = SETTINGS[number % len(SETTINGS)]
        self.known, self.asked, self.problems = {}, 0, []

    def visit(self):
        client = Client(self.url, verbose=False)
        try:
            for number, question in enumerate(self.random.sample(self.questions[:6], 3)):
                file = handle_file(str(self.path)) if number == 0 else None
                compare = self.random.random() < 0.3
                values = (self.method, "tokens", self.keep, 0.9, OWN, OWN, False, "plain" if compare else "nothing")
                self.check(question, client.predict(question.text, file, *values, api_name="/ask"), first=number == 0)
        finally:
            client.close()

    def check(self, question, turn, first):
        reply = turn["replies"]["merged"]
        self.asked += 1
        mine = [{"name": self.path.name}] if first else []
        named = [{"name": picture["name"]} for picture in turn["pictures"]]
        if turn["question"] != question.text or named != mine or reply["state"] != "done":
            self.problems.append(f"asked {question.text!r}, got {turn}")
        if reply["settings"]["method"] != self.method or reply["figures"]["visual_tokens"] != self.keep:
            self.problems.append(f"asked with {self.method} {self.keep}, got {reply['label']}")
        if first and self.known.setdefault(question.text, reply["answer"]) != reply["answer"]:
            self.problems.append(f"{question.text!r}: once {self.known[question.text]!r}, now {reply['answer']!r}")

    def keep_coming(self, end):
        while time.monotonic() < end and not self.problems:
            try:
                self.visit()
            except Exception as error:
                self.problems.append(repr(error))


def crowd(guests, seconds):
    end = time.monotonic() + seconds
    threads = [threading.Thread(target=guest.keep_coming, args=[end]) for guest in guests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_eight_visitors_for_two_minutes(program, tmp_path):  # noqa: F811
    guests = [Guest(program.url, number, tmp_path) for number in range(VISITORS)]
    for guest in guests:  # alone: the answers that must come again in the crowd
        guest.visit()
    crowd(guests, SECONDS / 3)  # warm-up
    before, asked = resident(program), sum(guest.asked for guest in guests)
    crowd(guests, SECONDS)
    after, asked = resident(program), sum(guest.asked for guest in guests) - asked
    sys.stdout.write(
        f"\n{VISITORS} visitors, {SECONDS:.0f} s: {asked} answers, resident memory {before:.0f} -> {after:.0f} MB "
        f"({after / before - 1:+.1%}), load average {os.getloadavg()[0]:.1f}\n"
    )
    assert [guest.problems for guest in guests] == [[]] * VISITORS
    assert asked >= VISITORS * 3 and after / before < GROWTH
    name = f"{VISITORS}_visitors_for_{SECONDS:.0f}_s"
    values = {
        name: f"{asked} answers, no error",
        "resident_memory_before_and_after_it": f"{before:.0f} → {after:.0f} MB ({after / before - 1:+.1%})",
    }
    record("test-load", **values)
