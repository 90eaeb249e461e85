"""Asking in a conversation of the chat."""

from pitome_mllm_demo.controls import NOTHING, Controls

PITOME = Controls("pitome", keep=144)


def said(events):
    """The last of what a generator yields."""
    *_, last = events
    return last


def ask(chat, question, files=(), controls=PITOME, compare=NOTHING):
    return said(chat.ask(question, files, controls, compare))
