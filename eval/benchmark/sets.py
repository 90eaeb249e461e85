"""The fixed test and validation sets: 210 pictures with 16 questions each, by seed, checked against recorded hashes."""

import functools
import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from pitome_mllm.methods import UserError

from .glyphs import SPLITS
from .questions import CATEGORIES, Question, make_questions
from .scenes import TIERS, Scene, lay_out, make_scene

SCENES = 210  # per split, a third of each tier
PER_SCENE = 16
_SEED = 20_000
_EVEN = dict.fromkeys(CATEGORIES, 1.0)
_DATA = Path(__file__).parents[1] / "data"


def scene_questions(number: int, split: str = "test") -> tuple[Scene, list[Question]]:
    """Scene `number` of a split with its questions, not checked against the recorded hash."""
    if split not in SPLITS[1:]:
        raise UserError(f"unknown split {split!r}; choices: {', '.join(SPLITS[1:])}")
    if not 0 <= number < SCENES:
        raise UserError(f"scene {number} does not exist; {split} has scenes 0 to {SCENES - 1}")
    rng = np.random.default_rng((_SEED, SPLITS.index(split), number))
    tier = list(TIERS)[number % len(TIERS)]
    made = make_scene(rng, tier, split)
    return made, make_questions(rng, made.objects, tier, PER_SCENE, _EVEN)


def digest(made: Scene, asked: list[Question]) -> str:
    """sha256 of a picture with its questions and answers."""
    sha = hashlib.sha256(made.pixels.tobytes())
    for question in asked:
        sha.update(f"\n{question.category}|{question.text}|{question.answer}".encode())
    return sha.hexdigest()


@functools.cache
def recorded(split: str) -> list[str]:
    """The recorded hash of every scene of a split."""
    return json.loads((_DATA / f"{split}.json").read_text())["scenes"]


def scene(number: int, split: str = "test") -> tuple[Image.Image, list[Question]]:
    """Picture `number` of a split and its questions; RuntimeError if this machine draws another picture."""
    made, asked = scene_questions(number, split)
    if digest(made, asked) != recorded(split)[number]:
        raise RuntimeError(
            f"{split} scene {number} differs from the recorded one (eval/data/{split}.json): the versions of numpy "
            f"{np.__version__} and Pillow {Image.__version__} may draw otherwise, or the generator was changed. "
            "Figures measured on it cannot be compared with the recorded ones."
        )
    return Image.fromarray(made.pixels), asked


@functools.cache
def questions(split: str = "test") -> list[tuple[int, Question]]:
    """Every question of a split with the number of its scene; all pictures are checked on the way."""
    return [(number, question) for number in range(SCENES) for question in scene(number, split)[1]]


def record(split: str) -> None:
    """Write the hashes of a split; for a deliberate change of the generator only, since it makes a new benchmark."""
    made = [scene_questions(number, split) for number in range(SCENES)]
    hashes = [digest(*pair) for pair in made]
    content = {
        "split": split,
        "questions": sum(len(asked) for _, asked in made),
        "categories": dict(Counter(q.category for _, asked in made for q in asked)),
        "tiers": dict(Counter(q.tier for _, asked in made for q in asked)),
        "sha256": hashlib.sha256("".join(hashes).encode()).hexdigest(),
        "scenes": hashes,
    }
    (_DATA / f"{split}.json").write_text(json.dumps(content, indent=1) + "\n")


@functools.cache
def _common_answers(layouts: int) -> tuple[dict[str, str], dict[str, str]]:
    """The most common answer of each question text, and of each category, in training data."""
    by_text, by_category = defaultdict(Counter), defaultdict(Counter)
    for number in range(layouts):
        rng = np.random.default_rng((1, number))
        tier = list(TIERS)[number % len(TIERS)]
        for question in make_questions(rng, lay_out(rng, TIERS[tier]), tier, PER_SCENE, _EVEN):
            by_text[question.text][question.answer] += 1
            by_category[question.category][question.answer] += 1
    return tuple({k: c.most_common(1)[0][0] for k, c in table.items()} for table in (by_text, by_category))


def blind_answer(question: Question, layouts: int = 4000) -> str:
    """The best answer without looking: the most common one to exactly this text in so many training scenes."""
    by_text, by_category = _common_answers(layouts)
    return by_text.get(question.text, by_category[question.category])


def main() -> None:
    """Record both splits."""
    for split in SPLITS[1:]:
        record(split)


if __name__ == "__main__":
    main()
