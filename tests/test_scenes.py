"""Scenes and questions: reproducible, balanced, and split so that nothing of the test set is ever trained on."""

import functools
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from pitome_mllm_eval.benchmark import glyphs, questions, scenes, sets
from pitome_mllm_eval.benchmark.glyphs import DIGITS, SHAPES, SPLITS, archive, digit_mask, digit_scans, pick
from pitome_mllm_eval.benchmark.questions import CATEGORIES, make_questions, vocabulary, words
from pitome_mllm_eval.benchmark.scenes import CANVAS, COLOURS, PATCH, TIERS, lay_out, make_scene
from pitome_mllm_eval.training.tiny_batch import PHASES, training_batch

YES_OR_NO = ("existence", "location", "relation")
SIGMAS = 4  # by so many standard deviations of fair draws a share may stray


@pytest.fixture(scope="module")
def asked():
    """Questions on 1,500 training layouts."""
    out = []
    for number in range(1500):
        rng = np.random.default_rng((9, number))
        tier = list(TIERS)[number % 3]
        out += make_questions(rng, lay_out(rng, TIERS[tier]), tier, 16)
    return out


@pytest.fixture(scope="module")
def held_out():
    """All questions of the validation and test sets; drawing them raises where a picture is not the recorded one."""
    return {split: [q for _, q in sets.questions(split)] for split in SPLITS[1:]}


@pytest.fixture(params=["training", "held out"])
def pool(request, asked):
    """Questions whose answers shall be balanced."""
    return asked if request.param == "training" else sum(request.getfixturevalue("held_out").values(), [])


@pytest.fixture
def used(monkeypatch):
    """Split of each digit scan and name of each photograph that scenes are drawn from, noted as they are handed out."""
    found = {"scans": {}, "photos": set()}
    splits, names = archive("digits.npz")["split"], {id(pixels): n for n, pixels in archive("photos.npz").items()}

    def note_scan(scan, size):
        found["scans"][scan] = SPLITS[splits[scan]]
        return digit_mask(scan, size)

    def note_photo(rng, items):
        item = pick(rng, items)
        if isinstance(item, np.ndarray):
            found["photos"].add(names[id(item)])
        return item

    monkeypatch.setattr(scenes, "digit_mask", note_scan)
    monkeypatch.setattr(scenes, "pick", note_photo)
    return found


def training_pixels(pictures: int) -> list[np.ndarray]:
    """Pictures of every phase, with questions one by one and with conversations."""
    batches = []
    for index, phase in enumerate(PHASES):
        for chat in (0, 1):
            batches.append(training_batch(0, index, replace(phase, pictures=pictures, chat_share=chat), chat))
    assert {batch["pixels"].shape[-1] for batch in batches} == {96, CANVAS}
    return [picture for batch in batches for picture in batch["pixels"].numpy()]


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


def test_no_part_of_a_photograph_is_in_both_sets():
    columns = defaultdict(set)
    for name, pixels in archive("photos.npz").items():
        columns[name.split("_")[0]] |= {pixels[:, x].tobytes() for x in range(pixels.shape[1])}
    assert set(columns) == {"train", "eval"} and not columns["train"] & columns["eval"]


def test_training_draws_from_its_own_scans_and_photographs(used):
    training_pixels(16)
    assert set(used["scans"].values()) == {"train"} and len(used["scans"]) > 100
    assert used["photos"] == {name for name in archive("photos.npz") if name.startswith("train_")}


@pytest.mark.parametrize("split", SPLITS[1:])
def test_the_benchmark_draws_from_its_own_scans_and_photographs(split, used):
    for number in range(60):
        sets.scene_questions(number, split)
    assert set(used["scans"].values()) == {split} and len(used["scans"]) > 100
    assert used["photos"] == {name for name in archive("photos.npz") if name.startswith("eval_")}


def test_what_is_held_out_leaves_no_trace_in_training(monkeypatch):
    """By whatever way pictures get at the stored files: with all that is held out inverted, none of them changes."""

    @functools.cache
    def spoiled(name):
        data = dict(archive(name))
        if "split" not in data:
            return {part: pixels if part.startswith("train_") else 255 - pixels for part, pixels in data.items()}
        held_out = data["split"] != SPLITS.index("train")
        return data | {"images": np.where(held_out[:, None, None], 16 - data["images"], data["images"])}

    before, tested = training_pixels(4), [sets.scene_questions(n)[0].pixels for n in range(6)]
    monkeypatch.setattr(glyphs, "archive", spoiled)
    monkeypatch.setattr(scenes, "archive", spoiled)
    for name in ("digit_mask", "_photos"):  # past their caches
        monkeypatch.setattr(scenes, name, getattr(scenes, name).__wrapped__)
    assert all(map(np.array_equal, before, training_pixels(4)))
    assert not any(np.array_equal(p, sets.scene_questions(n)[0].pixels) for n, p in enumerate(tested))


def test_questions_use_the_vocabulary_and_one_word_answers(asked):
    known = set(vocabulary())
    assert {w for q in asked for w in words(q.text)} | {q.answer for q in asked} <= known
    assert all(words(q.text)[place] in (o.kind, o.colour, "left", "right") for q in asked for place, o in q.mentions)


def strays(found: Counter, answers) -> float:
    """By how many standard deviations the most common or the rarest of `answers` misses an even share."""
    assert set(found) <= set(answers)
    total, share = found.total(), 1 / len(answers)
    return max(abs(found[a] - total * share) for a in answers) / (total * share * (1 - share)) ** 0.5


def tally(pool, categories) -> dict[tuple[str, str], Counter]:
    """Answers to the questions of some categories: of each tier, and of all."""
    counts = defaultdict(Counter)
    for q in pool:
        if q.category in categories:
            counts[q.category, q.tier][q.answer] += 1
            counts[q.category, "all"][q.answer] += 1
    assert len(counts) == len(categories) * 4
    return counts


def test_yes_and_no_are_balanced_for_every_wording(asked):
    counts = defaultdict(Counter)
    for q in asked:
        if q.category in YES_OR_NO:
            telling = {"left", "right", "above", "below", "top", "bottom", "digit"}
            shape = " ".join(w for w in words(q.text) if w in telling)
            counts[q.category, shape][q.answer] += 1
    for key, found in counts.items():
        assert abs(found["yes"] / found.total() - 0.5) < SIGMAS * 0.5 / found.total() ** 0.5 + 0.01, (key, found)


def test_yes_and_no_are_balanced_in_every_tier(pool):
    for key, found in tally(pool, YES_OR_NO).items():
        assert strays(found, ("yes", "no")) < SIGMAS, (key, found)


@pytest.mark.parametrize("category, answers", [("colour", COLOURS), ("shape", SHAPES), ("digit", DIGITS)])
def test_each_answer_is_as_common_as_the_others(pool, category, answers):
    for key, found in tally(pool, (category,)).items():
        assert strays(found, tuple(answers)) < SIGMAS, (key, found)


def test_counts_are_spread(pool):
    for (_, tier), found in tally(pool, ("count",)).items():
        assert set(found) == set("01234"), (tier, found)
        if tier == "all":
            assert max(found.values()) / found.total() < 0.35


def test_a_draft_drawn_anew_keeps_its_coin(monkeypatch):
    """Otherwise, answers that are harder to draft would be rarer."""
    calls = []

    def reluctant(rng, objects, yes):
        calls.append(yes)
        return (f"{len(calls)}", "yes" if yes else "no", ()) if yes or rng.random() < 0.5 else None

    monkeypatch.setitem(questions._MAKERS, "location", reluctant)
    only = dict.fromkeys(CATEGORIES, 0.0) | {"location": 1.0}
    found = Counter(q.answer for q in make_questions(np.random.default_rng(0), (), "easy", 2000, only))
    assert found.total() == 2000 and strays(found, ("yes", "no")) < SIGMAS
    assert calls.count(False) > 1.5 * calls.count(True)  # so many drafts were rejected


def test_categories_have_their_share(asked):
    found = Counter(q.category for q in asked)
    assert set(found) == set(CATEGORIES)
    assert 0.15 < found["relation"] / found.total() < 0.27
    assert min(found.values()) / found.total() > 0.07


@pytest.mark.parametrize("split", SPLITS[1:])
def test_the_benchmark_is_the_recorded_one(split, held_out):
    every = held_out[split]
    assert len(every) >= 3000
    assert min(Counter(q.category for q in every).values()) >= 300
    assert len(Counter(q.tier for q in every)) == 3
    blind = [sets.blind_answer(q, layouts=1500) == q.answer for q in every]
    assert np.mean(blind) <= 0.45


def test_one_scene_is_quick_and_checked(monkeypatch):
    picture, asked = sets.scene(7)
    assert picture.size == (CANVAS, CANVAS) and len(asked) == sets.PER_SCENE
    with pytest.raises(ValueError, match="scenes 0 to"):
        sets.scene(sets.SCENES)
    with pytest.raises(ValueError, match="unknown split"):
        sets.scene(0, "train")
    monkeypatch.setattr(sets, "recorded", lambda split: ["0"] * sets.SCENES)
    with pytest.raises(RuntimeError, match="differs from the recorded"):
        sets.scene(7)
