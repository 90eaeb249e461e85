"""Questions about a scene: seven categories, one-word answers, no answer guessable from the text.

Yes or no is drawn by a fair coin before the question is made up, and stays when a draft does not fit the scene and is
drawn anew; counts are drawn before what is counted. So the wording says little about the answer:
`benchmark.blind_answer` measures how little.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .glyphs import DIGITS, SHAPES, pick
from .scenes import CANVAS, COLOURS, KINDS, PATCH, Object

CATEGORIES = ("existence", "colour", "shape", "digit", "count", "location", "relation")
SHARES = {
    "existence": 0.12, "colour": 0.10, "shape": 0.11, "digit": 0.15, "count": 0.18, "location": 0.13, "relation": 0.21,
}  # fmt: skip
PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
HALVES = ("left", "right", "top", "bottom")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
RELATIONS = ("left of", "right of", "above", "below")
MOST = 4  # largest count asked for
COUNT_WEIGHTS = (0.15, 0.25, 0.6, 2.0, 8.0)  # large counts are rare among scenes, so they are asked for when there
APART = 2 * PATCH  # least distance along the axis a relation speaks of
OFF_CENTRE = PATCH  # least distance from the middle line that "half" and corner questions need


@dataclass(frozen=True)
class Question:
    """One question with its one-word answer.

    `mentions` pairs the position of a word with the object it points to; training uses it as an auxiliary target.
    """

    text: str
    answer: str
    category: str
    tier: str
    mentions: tuple[tuple[int, Object], ...] = ()


Draft = tuple[str, str, tuple[tuple[str, Object], ...]]  # text, answer, (word, object) pairs in order of appearance


def words(text: str) -> list[str]:
    """The words of a question as the model's tokenizer sees them: lower case, no punctuation."""
    return text.lower().replace("?", " ").split()


def vocabulary() -> tuple[str, ...]:
    """Every word that a question or an answer can hold, sorted."""
    fixed = """is there a what colour the which shape digit in how many objects digits are half left right top bottom
    of above below yes no user: assistant:"""
    return tuple(sorted({*fixed.split(), *COLOURS, *KINDS, *PLURALS.values()}))


def _alone(objects, key) -> list[Object]:
    """Objects that share `key` with no other."""
    keys = [key(o) for o in objects]
    return [o for o, k in zip(objects, keys, strict=True) if keys.count(k) == 1]


def _coin(rng: np.random.Generator) -> bool:
    return bool(rng.random() < 0.5)


def _named(rng, objects) -> list[tuple[str, Object]]:
    """Every object that a short name singles out: "star" where it is the only one, else "red star"."""
    kinds = {id(o) for o in _alone(objects, lambda o: o.kind)}
    pairs = {id(o) for o in _alone(objects, lambda o: (o.kind, o.colour))}
    return [(o.kind if id(o) in kinds else f"{o.colour} {o.kind}", o) for o in objects if id(o) in pairs]


def _existence(rng, objects, yes: bool) -> Draft | None:
    digit = rng.random() < 0.35
    there = [o for o in objects if o.is_digit == digit]
    if not there:
        return None
    model = pick(rng, there)
    if digit:
        have = {o.kind for o in there}
        kind = model.kind if yes else pick(rng, [d for d in DIGITS if d not in have])
        text, key = f"is there a digit {kind}?", kind
        found = [o for o in there if o.kind == kind]
    else:
        colour, kind = model.colour, model.kind
        if not yes:  # near misses: the right shape or the right colour is often there
            u = rng.random()
            colour = colour if u < 0.4 else pick(rng, tuple(COLOURS))
            kind = kind if 0.4 <= u < 0.8 else pick(rng, SHAPES)
        text, key = f"is there a {colour} {kind}?", kind
        found = [o for o in there if (o.colour, o.kind) == (colour, kind)]
    if bool(found) != yes:
        return None
    return text, "yes" if yes else "no", ((key, found[0]),) if len(found) == 1 else ()


def _colour(rng, objects, yes: bool) -> Draft | None:
    alone = _alone(objects, lambda o: o.kind)
    if not alone:
        return None
    o = pick(rng, alone)
    return f"what colour is the {o.kind}?", o.colour, ((o.kind, o),)


def _in_corner(o: Object, corner: str, margin: float) -> bool:
    """Whether the centre lies in a quarter of the canvas, by `margin` pixels at least (or, below zero, nearly so)."""
    index = CORNERS.index(corner)
    signs = (1 if index % 2 else -1, 1 if index >= 2 else -1)
    return all(sign * (c - CANVAS / 2) >= margin for sign, c in zip(signs, o.centre, strict=True))


def _what(rng, objects, noun: str) -> Draft | None:
    """The shape (or digit) of one colour, or in one corner."""
    if rng.random() < 0.6:
        alone = _alone(objects, lambda o: o.colour)
        if not alone:
            return None
        o = pick(rng, alone)
        return f"which {noun} is {o.colour}?", o.kind, ((o.colour, o),)
    corner = pick(rng, CORNERS)
    near = [o for o in objects if _in_corner(o, corner, -OFF_CENTRE)]
    if len(near) != 1 or not _in_corner(near[0], corner, OFF_CENTRE):
        return None
    return f"what {noun} is in the {corner}?", near[0].kind, ((corner.split()[1], near[0]),)


def _shape(rng, objects, yes: bool) -> Draft | None:
    return _what(rng, [o for o in objects if not o.is_digit], "shape")


def _digit(rng, objects, yes: bool) -> Draft | None:
    return _what(rng, [o for o in objects if o.is_digit], "digit")


def _count(rng, objects, yes: bool) -> Draft | None:
    u = rng.random()
    if u < 0.45:
        options = {f"how many {c} objects are there?": sum(o.colour == c for o in objects) for c in COLOURS}
    elif u < 0.85:
        options = {f"how many {PLURALS[s]} are there?": sum(o.kind == s for o in objects) for s in SHAPES}
    else:
        options = {"how many digits are there?": sum(o.is_digit for o in objects)}
    counts = sorted({n for n in options.values() if n <= MOST})
    if not counts:
        return None
    weights = np.cumsum([COUNT_WEIGHTS[n] for n in counts])
    count = counts[int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))]
    return pick(rng, [text for text, n in options.items() if n == count]), str(count), ()


def _location(rng, objects, yes: bool) -> Draft | None:
    vertical = int(rng.integers(2))
    named = [(n, o) for n, o in _named(rng, objects) if abs(o.centre[vertical] - CANVAS / 2) >= OFF_CENTRE]
    if not named:
        return None
    name, o = pick(rng, named)
    far = o.centre[vertical] > CANVAS / 2
    half = HALVES[2 * vertical + (far if yes else not far)]
    return f"is the {name} in the {half} half?", "yes" if yes else "no", ((o.kind, o),)


def _relation(rng, objects, yes: bool) -> Draft | None:
    vertical, swap = int(rng.integers(2)), _coin(rng)
    named = _named(rng, objects)
    pairs = [
        (first, second)
        for i, first in enumerate(named)
        for second in named[:i]
        if abs(first[1].centre[vertical] - second[1].centre[vertical]) >= APART
    ]
    if not pairs:
        return None
    (name_a, a), (name_b, b) = pick(rng, pairs)[:: -1 if swap else 1]
    after = a.centre[vertical] > b.centre[vertical]
    relation = RELATIONS[2 * vertical + (after if yes else not after)]
    return f"is the {name_a} {relation} the {name_b}?", "yes" if yes else "no", ((a.kind, a), (b.kind, b))


_MAKERS = dict(zip(CATEGORIES, (_existence, _colour, _shape, _digit, _count, _location, _relation), strict=True))


def _finish(draft: Draft, category: str, tier: str) -> Question:
    text, answer, pointers = draft
    sequence, start, mentions = words(text), 0, []
    for word, target in pointers:
        start = sequence.index(word, start)
        mentions.append((start, target))
        start += 1
    return Question(text, answer, category, tier, tuple(mentions))


def _draft(rng, category: str, objects, seen: set[str]) -> Draft | None:
    """A question of one category that was not asked yet, if the objects allow one; its coin is tossed once."""
    yes = _coin(rng)
    for _ in range(8):
        draft = _MAKERS[category](rng, objects, yes)
        if draft is not None and draft[0] not in seen:
            return draft
    return None


def make_questions(
    rng: np.random.Generator, objects: Sequence[Object], tier: str, count: int, shares: dict[str, float] = SHARES
) -> list[Question]:
    """`count` different questions on one scene, categories drawn by `shares`; rarely fewer, on poor scenes."""
    edges = np.cumsum([shares[c] for c in CATEGORIES])
    out, seen = [], set()
    for _ in range(count * 4):
        if len(out) == count:
            break
        category = CATEGORIES[int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))]
        if (draft := _draft(rng, category, objects, seen)) is not None:
            seen.add(draft[0])
            out.append(_finish(draft, category, tier))
    return out
