"""The error that every mistake of a user is told by."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user: what was got, what is possible, and what to do.

    Command line, chat and server show its sentence alone; any other exception is a fault of a program, ours or another,
    and shows where it happened.
    """


def missing_package(need: str, extra: str) -> UserError:
    """The error that says ``need``, and how to install the packages of an extra."""
    return UserError(f"{need}; in a checkout of pitome-mllm: pip install '.[{extra}]'")
