"""Training batches: pictures, dense labels of every patch, and rows of questions as tokens.

All patches of a picture (or of its window) are in the batch, whatever they show: which tokens the model sees never
depends on where the objects are.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ..benchmark.questions import Question, make_questions, words
from ..benchmark.scenes import CANVAS, COLOURS, GRID, KINDS, PATCH, TIERS, Object, Scene, make_scene
from .tiny_model import EOS, PAD, word_ids

IGNORE = -100
TURN_LENGTH = 14  # longest turn: "user:", 9 words of question, "assistant:", answer, end; rounded up
ROW_LABELS = ("labels", "column", "row", "across", "down")
_IDS = word_ids()
_KIND = {kind: i + 1 for i, kind in enumerate(KINDS)}
_COLOUR = {colour: i + 1 for i, colour in enumerate(COLOURS)}


@dataclass(frozen=True)
class Phase:
    """One stretch of training, with `rows` of questions per picture (in some batches, conversations instead)."""

    name: str
    steps: int
    pictures: int
    rows: int
    side: int = CANVAS  # of the part of the canvas that is drawn
    ask: bool = True
    rate: tuple[float, float] = (1.0, 1.0)  # learning-rate factor at the start and at the end
    warmup: int = 30
    auxiliary: float = 0.3
    chat_share: float = 0.2


PHASES = (
    Phase("see", steps=700, pictures=24, rows=0, side=96, ask=False, warmup=60, auxiliary=1.0, chat_share=0.0),
    Phase("ask-small", steps=960, pictures=24, rows=16, side=96, warmup=60),
    Phase("ask-full", steps=2000, pictures=12, rows=20, rate=(0.7, 0.01)),
)


def patch_ids(window: tuple[int, int, int]) -> np.ndarray:
    """Canvas-wide index (row * GRID + column) of each patch in the window, in reading order."""
    column, row, count = (v // PATCH for v in window)
    return ((row + np.arange(count))[:, None] * GRID + column + np.arange(count)).reshape(-1)


def cell(o: Object) -> tuple[int, int]:
    """Column and row of the patch under the object's centre."""
    return int(o.centre[0] // PATCH), int(o.centre[1] // PATCH)


def side(a: Object, b: Object, axis: int) -> int:
    """0, 1 or 2: along the axis (0 = x, 1 = y), `a` lies before, level with, or after `b`."""
    apart = a.centre[axis] - b.centre[axis]
    return 1 if abs(apart) < PATCH else 2 if apart > 0 else 0


def patch_labels(scene: Scene) -> dict[str, np.ndarray]:
    """What each patch shows: kind and colour (0 = background), object centre here or not, offset to its centre."""
    column, row, count = (v // PATCH for v in scene.window)
    kind, colour = np.zeros((count, count), np.int64), np.zeros((count, count), np.int64)
    centre, offset = np.zeros((count, count), np.float32), np.zeros((count, count, 2), np.float32)
    most = np.full((count, count), 0.25 * PATCH * PATCH)  # a patch belongs to the object that covers most of it
    for o in scene.objects:
        x, y = o.x - column * PATCH, o.y - row * PATCH
        edges = np.arange(count) * PATCH
        wide = np.clip(np.minimum(x + o.size, edges + PATCH) - np.maximum(x, edges), 0, None)
        high = np.clip(np.minimum(y + o.size, edges + PATCH) - np.maximum(y, edges), 0, None)
        area = high[:, None] * wide
        mine = area > most
        most[mine], kind[mine], colour[mine] = area[mine], _KIND[o.kind], _COLOUR[o.colour]
        middle = o.size / 2 - edges - PATCH / 2
        offset[mine] = np.stack(np.broadcast_arrays(x + middle, (y + middle)[:, None]), -1)[mine] / PATCH
        centre[cell(o)[1] - row, cell(o)[0] - column] = 1
    found = {"kind": kind, "colour": colour, "centre": centre}
    return {name: labels.reshape(-1) for name, labels in found.items()} | {"offset": offset.reshape(-1, 2)}


def encode_row(turns: list[Question], length: int) -> dict[str, np.ndarray]:
    """One row of tokens (length,): the turns of a conversation, less the "user:" and the picture before the first.

    ``labels``: the next token where it is an answer or the end after it, else `IGNORE`; ``column``, ``row`` of the
    object that a word mentions; ``across``, ``down`` at the second of two mentions: on which side of it the first lies.
    """
    row = {name: np.full(length, IGNORE, np.int64) for name in ROW_LABELS}
    tokens: list[int] = []
    for question in turns:
        if tokens:
            tokens += [EOS, _IDS["user:"]]
        for word, target in question.mentions:
            row["column"][len(tokens) + word], row["row"][len(tokens) + word] = cell(target)
        if len(question.mentions) == 2:
            (_, first), (word, second) = question.mentions
            for axis, name in enumerate(("across", "down")):
                row[name][len(tokens) + word] = side(first, second, axis)
        tokens += [_IDS[word] for word in words(question.text)] + [_IDS["assistant:"]]
        row["labels"][len(tokens) - 1] = _IDS[question.answer]
        tokens.append(_IDS[question.answer])
        row["labels"][len(tokens) - 1] = EOS
    row["tokens"] = np.array(tokens + [PAD] * (length - len(tokens)), np.int64)
    return row


def encode_scene(scene: Scene, rows: list[list[Question]], length: int) -> dict[str, np.ndarray]:
    """Everything about one picture; `rows` may be empty."""
    item = {"pixels": scene.pixels.transpose(2, 0, 1), "patches": patch_ids(scene.window), **patch_labels(scene)}
    encoded = [encode_row(row, length) for row in rows]
    return item | {name: np.stack([e[name] for e in encoded]) for name in (encoded[0] if encoded else ())}


def stack(items: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Items of equal shapes as one batch."""
    return {name: torch.from_numpy(np.stack([item[name] for item in items])) for name in items[0]}


def row_length(turns: int) -> int:
    """Tokens that a row of so many turns may need."""
    return TURN_LENGTH * turns - 2


def _training_item(rng: np.random.Generator, phase: Phase, turns: int) -> dict[str, np.ndarray]:
    """One picture and its questions."""
    rows = max(1, phase.rows // turns)
    while True:
        tier = list(TIERS)[int(rng.integers(len(TIERS)))]
        corner = rng.integers(0, (CANVAS - phase.side) // PATCH + 1, 2) * PATCH
        scene = make_scene(rng, tier, "train", (int(corner[0]), int(corner[1]), phase.side))
        questions = make_questions(rng, scene.objects, tier, rows * turns) if phase.ask else []
        if questions or not phase.ask:
            break
    while phase.ask and len(questions) < rows * turns:  # few objects: ask some again
        questions += questions[: rows * turns - len(questions)]
    rng.shuffle(questions)
    grouped = [questions[i : i + turns] for i in range(0, len(questions), turns)]
    return encode_scene(scene, grouped, row_length(turns))


def training_batch(seed: int, phase_index: int, phase: Phase, step: int) -> dict[str, torch.Tensor]:
    """Batch number `step` of a phase.

    A picture depends on the seed, the phase, the step and its number alone, which is what makes resuming exact.
    """
    coin = np.random.default_rng((seed, phase_index, step, phase.pictures))  # one past the pictures' own streams
    turns = 4 if coin.random() < phase.chat_share else 1
    generators = (np.random.default_rng((seed, phase_index, step, n)) for n in range(phase.pictures))
    return stack([_training_item(rng, phase, turns) for rng in generators])
