"""Scenes and questions: reproducible, balanced, and split so that nothing of the test set is ever trained on."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from pitome_mllm_eval import benchmark
from pitome_mllm_eval.glyphs import DIGITS, archive, digit_scans
from pitome_mllm_eval.questions import CATEGORIES, make_questions, vocabulary, words
from pitome_mllm_eval.scenes import CANVAS, PATCH, TIERS, lay_out, make_scene


@pytest.fixture(scope="module")
def asked():
    """Questions on 1,500 training layouts."""
    out = []
    for number in range(1500):
        rng = np.random.default_rng((9, number))
        tier = list(TIERS)[number % 3]
        out += make_questions(rng, lay_out(rng, TIERS[tier]), tier, 16)
    return out


def test_a_seed_gives_the_same_picture():
    one, two = (make_scene(np.random.default_rng(5), "hard") for _ in range(2))
    assert one.objects == two.objects and np.array_equal(one.pixels, two.pixels)
    assert one.pixels.shape == (CANVAS, CANVAS, 3) and one.pixels.dtype == np.uint8


@pytest.mark.parametrize("tier", TIERS)
def test_a_window_holds_all_objects(tier):
    for number in range(20):
        rng = np.random.default_rng(number)
        x, y = (int(v) * PATCH for v in rng.integers(0, 13, 2))
        made = make_scene(rng, tier, window=(x, y, 96))
        assert made.pixels.shape == (96, 96, 3)
        for o in made.objects:
            assert x <= o.x and o.x + o.size <= x + 96 and y <= o.y and o.y + o.size <= y + 96


def test_tiers_grow_harder():
    objects, sizes = defaultdict(list), defaultdict(list)
    for tier in TIERS:
        for number in range(200):
            made = lay_out(np.random.default_rng(number), TIERS[tier])
            objects[tier].append(len(made))
            sizes[tier] += [o.size for o in made]
    means = [np.mean(objects[t]) for t in TIERS]
    assert means == sorted(means)
    assert [np.median(sizes[t]) for t in TIERS] == sorted((np.median(sizes[t]) for t in TIERS), reverse=True)
    assert min(sizes["hard"]) <= 10 and max(sizes["medium"]) >= 60


def test_no_scan_belongs_to_two_splits():
    scans = {split: {s for d in DIGITS for s in digit_scans(split)[d]} for split in ("train", "validation", "test")}
    assert not (scans["train"] & scans["test"] or scans["train"] & scans["validation"])
    assert not scans["validation"] & scans["test"]
    assert all(len(digit_scans(split)[d]) >= 20 for split in scans for d in DIGITS)
    images = archive("digits.npz")["images"].reshape(-1, 64)
    train = {images[s].tobytes() for s in scans["train"]}
    assert not any(images[s].tobytes() in train for s in scans["test"] | scans["validation"])


def test_questions_use_the_vocabulary_and_one_word_answers(asked):
    known = set(vocabulary())
    assert {w for q in asked for w in words(q.text)} | {q.answer for q in asked} <= known
    assert all(words(q.text)[place] in (o.kind, o.colour, "left", "right") for q in asked for place, o in q.mentions)


def test_yes_and_no_are_balanced_for_every_wording(asked):
    counts = defaultdict(Counter)
    for q in asked:
        if q.category in ("existence", "location", "relation"):
            shape = " ".join(w for w in words(q.text) if w in {"left", "right", "above", "below", "top", "bottom"})
            counts[q.category, shape][q.answer] += 1
    for key, found in counts.items():
        assert abs(found["yes"] / found.total() - 0.5) < 4 * 0.5 / found.total() ** 0.5 + 0.01, (key, found)


def test_counts_are_spread(asked):
    found = Counter(q.answer for q in asked if q.category == "count")
    assert set(found) == set("012345")
    assert max(found.values()) / found.total() < 0.35


def test_categories_have_their_share(asked):
    found = Counter(q.category for q in asked)
    assert set(found) == set(CATEGORIES)
    assert 0.15 < found["relation"] / found.total() < 0.27
    assert min(found.values()) / found.total() > 0.07


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_benchmark_is_the_recorded_one(split):
    every = benchmark.questions(split)  # raises where a picture differs
    assert len(every) >= 3000
    assert min(Counter(q.category for _, q in every).values()) >= 300
    assert len(Counter(q.tier for _, q in every)) == 3
    blind = [benchmark.blind_answer(q, layouts=1500) == q.answer for _, q in every]
    assert np.mean(blind) <= 0.45


def test_one_scene_is_quick_and_checked(monkeypatch):
    picture, asked = benchmark.scene(7)
    assert picture.size == (CANVAS, CANVAS) and len(asked) == benchmark.PER_SCENE
    with pytest.raises(ValueError, match="scenes 0 to"):
        benchmark.scene(benchmark.SCENES)
    with pytest.raises(ValueError, match="unknown split"):
        benchmark.scene(0, "train")
    monkeypatch.setattr(benchmark, "recorded", lambda split: ["0"] * benchmark.SCENES)
    with pytest.raises(RuntimeError, match="differs from the recorded"):
        benchmark.scene(7)
