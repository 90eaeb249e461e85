"""The chat as HTML: questions with small pictures, replies with their settings and their strip of figures.

Everything that people or models wrote is escaped and on one line, so that nothing in it is taken for markup and no
picture or link in it makes the page ask another machine for anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from pitome_mllm.costs.answer import AnswerCost

from .controls import PLAIN
from .pictures import data_uri
from .turns import Reply, Turn


def short(value: float) -> str:
    """Three significant digits below 100, whole numbers above."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


# Field of AnswerCost: its name with its unit, how it is written, and where it comes from.
FIGURES: dict[str, tuple[str, Callable[[float], str], str]] = {
    "visual_tokens": ("visual tokens", str, "of all pictures, as the language model reads them"),
    "prompt_tokens": ("prompt tokens", str, "visual and text tokens that the language model reads"),
    "tower_ms": ("tower, ms", "{:.0f}".format, "measured here: the vision tower, merging included"),
    "prefill_ms": ("1st token, ms", "{:.0f}".format, "measured here: from the pictures to the first new token"),
    "per_token_ms": ("each token, ms", short, "measured here: new tokens after the first one"),
    "kv_cache_mb": ("KV cache, MB", short, "calculated: keys and values of the prompt"),
    "gflops": ("GFLOPs", short, "calculated: from the pictures to the first new token"),
}
SAVED = {"visual_tokens": "visual tokens", "gflops": "FLOPs", "kv_cache_mb": "KV cache"}  # counted, not by the clock


def messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """The turns as a chatbot takes them: a role and one line of HTML each."""
    said = []
    for turn in turns:
        said.append({"role": "user", "content": question(turn)})
        said.append({"role": "assistant", "content": replies(turn)})
    return said


def question(turn: Turn) -> str:
    pictures = "".join(
        f'<img class="pm-thumb" src="{data_uri(picture.image)}" alt="{text(picture.name)}">'
        for picture in turn.pictures
    )
    asked = text(turn.question) if turn.question else "<i>Only look at it</i>"
    return f'<div class="pm-question">{pictures}<div class="pm-text">{asked}</div></div>'


def replies(turn: Turn) -> str:
    """All replies of a turn side by side; on narrow pages one below the other."""
    cards = "".join(card(lane, reply, bool(turn.question)) for lane, reply in turn.replies.items())
    return f'<div class="pm-lanes">{cards}</div>'


def card(lane: str, reply: Reply, asked: bool) -> str:
    """One reply: its label, its text, its figures."""
    if reply.state == "waiting":
        words = f"<i>Waiting for {reply.ahead} before this one…</i>" if reply.ahead else "<i>Looking…</i>"
    elif not asked:
        words = "<i>Looked at the picture without a question: see <b>Look inside</b>.</i>"
    else:
        words = text(reply.text)
    if reply.state == "stopped":
        words += ' <i class="pm-stopped">(stopped)</i>'
    strip = "" if reply.figures is None else figures(reply.figures, reply.figures.over(reply.plain), lane)
    return (
        f'<div class="pm-card pm-{lane} pm-{reply.state}"><div class="pm-label">{text(reply.label)}</div>'
        f'<div class="pm-text">{words}</div>{strip}</div>'
    )


def figures(found: AnswerCost, shares: dict[str, float], lane: str) -> str:
    """The strip: every figure that is known and, for merged tokens, its ratio to the plain model's."""
    cells = []
    for name, (title, form, how) in FIGURES.items():
        value = getattr(found, name)
        if value is None:
            continue
        ratio = _ratio(shares[name]) if lane != PLAIN and name in shares else ""
        cells.append(
            f'<div class="pm-cell" title="{how}"><div class="pm-name">{title}</div>'
            f'<div class="pm-value">{form(value)}</div>{ratio}</div>'
        )
    words = saved(shares) if lane != PLAIN and shares else ""
    if found.tower_ms and found.prefill_ms:
        words += f" {found.tower_ms / found.prefill_ms:.0%} of the time to the first token went to the vision tower."
    return f'<div class="pm-strip">{"".join(cells)}</div><div class="pm-saved">{words}</div>'


def _ratio(share: float) -> str:
    """A share of the plain model's figure: less is better, and said by sign and colour."""
    kind, sign = ("better", "▼") if share < 0.995 else ("worse", "▲") if share >= 1.005 else ("same", "")
    return f'<div class="pm-ratio pm-{kind}">×{share:.2f} {sign}</div>'


def saved(shares: dict[str, float]) -> str:
    """What merging saves of the plain model's figures, in words."""
    found = [f"{1 - shares[name]:.0%} of the {what}" for name, what in SAVED.items() if shares.get(name, 1) < 1]
    words = f"Saved: {', '.join(found)}" if found else "Nothing saved"
    return f"<b>{words}.</b> × = share of the plain model's."


def text(words: str) -> str:
    """Words of others, as one line of HTML that shows exactly them."""
    return "<br>".join(escape(line) for line in words.splitlines())


def notice(words: str, kind: str = "error") -> str:
    """A line that stands out: an "error" or an "info"."""
    return f'<div class="pm-notice pm-{kind}" role="alert">{text(words)}</div>'
