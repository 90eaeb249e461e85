"""Accuracy on the benchmark: ``python -m pitome_mllm_eval.benchmark.score --limit 500``.

All questions on a picture share one tower pass and one prefill of the prompt up to the picture, through the model's own
forward, so whatever is attached to the model takes part. An answer is the likeliest next token: all are single words.
"""

import argparse
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pitome_mllm.commands._report import print_table
from pitome_mllm.hooks import caches
from pitome_mllm.serving.prompts import message, write

from .bootstrap import Bootstrap, groups
from .glyphs import SPLITS
from .questions import Question
from .sets import PER_SCENE, SCENES, blind_answer, scene

BATCH = 4  # pictures that are answered at once


@dataclass(frozen=True)
class Record:
    """One answered question."""

    scene: int
    question: Question
    predicted: str

    @property
    def right(self) -> bool:
        """Whether the model's answer is the true one."""
        return self.predicted == self.question.answer


@dataclass(frozen=True)
class Prompts:
    """Questions on one picture (1, 3, H, W): token ids up to and with the picture, and what follows of each."""

    pixels: torch.Tensor
    prefix: list[int]
    rest: list[list[int]]
    pad: int


def prompts(processor, image_token: int, length: int, picture, texts: Sequence[str]) -> Prompts:
    """Questions on one picture, of which the prompt holds ``length`` placeholders."""
    asked = [processor.tokenizer(write(processor, [message(text, pictures=1)])).input_ids for text in texts]
    at = asked[0].index(image_token)
    pixels = processor.image_processor(images=picture, return_tensors="pt")["pixel_values"]
    prefix = asked[0][:at] + [image_token] * length
    return Prompts(
        pixels, prefix, [ids[ids.index(image_token) + 1 :] for ids in asked], processor.tokenizer.pad_token_id
    )


@torch.inference_mode()
def predict(model, asked: Sequence[Prompts]) -> list[int]:
    """First token of the answer to each question, picture by picture."""
    device = model.device
    pixels = torch.cat([one.pixels for one in asked])
    prefix = torch.tensor([one.prefix for one in asked], device=device)
    out = model(
        input_ids=prefix,
        attention_mask=torch.ones_like(prefix),
        pixel_values=pixels.to(device, model.dtype),
        use_cache=True,
        logits_to_keep=1,
    )
    cache = caches.cache_of(out)
    most = max(len(one.rest) for one in asked)
    cache.batch_repeat_interleave(most)
    ids = [row for one in asked for row in one.rest + one.rest[:1] * (most - len(one.rest))]
    lengths = torch.tensor([len(row) for row in ids])
    width = int(lengths.max())
    rest = torch.tensor([row + [asked[0].pad] * (width - len(row)) for row in ids], device=device)
    language = model.model.language_model  # which goes on in the positions that the cache was filled with
    states = language(input_ids=rest, **{caches.name_for(language): cache}).last_hidden_state
    found = model.lm_head(states[torch.arange(len(ids)), lengths - 1]).argmax(-1).view(-1, most).tolist()
    return [token for one, row in zip(asked, found, strict=True) for token in row[: len(one.rest)]]


@functools.lru_cache(maxsize=SCENES)
def _of_scene(processor, image_token: int, length: int, number: int, split: str) -> tuple[Prompts, list[Question]]:
    """A picture of the benchmark, drawn and checked once for all runs of a process."""
    picture, asked = scene(number, split)
    return prompts(processor, image_token, length, picture, [question.text for question in asked]), asked


def predicted(model, processor, split: str = "test", limit: int | None = None) -> Iterator[tuple[int, Question, str]]:
    """Scene, question and answer, of the first ``limit`` questions of a split (all by default)."""
    left, batch = SCENES * PER_SCENE if limit is None else limit, []
    for number in range(SCENES):
        made, asked = _of_scene(processor, model.config.image_token_id, model.config.image_seq_length, number, split)
        batch.append((number, Prompts(made.pixels, made.prefix, made.rest[:left], made.pad), asked[:left]))
        left -= len(asked)
        if len(batch) == BATCH or left <= 0 or number == SCENES - 1:
            found = processor.tokenizer.convert_ids_to_tokens(predict(model, [made for _, made, _ in batch]))
            questions = [(scene, question) for scene, _, asked in batch for question in asked]
            yield from ((*known, answer) for known, answer in zip(questions, found, strict=True))
            batch = []
        if left <= 0:
            return


def score(model, processor, split: str = "test", limit: int | None = None) -> Iterator[Record]:
    """The answers to the first ``limit`` questions of a split."""
    return itertools.starmap(Record, predicted(model, processor, split, limit))


def table(records: list[Record]) -> list[dict]:
    """Accuracy, interval and blind baseline: overall, per category and per tier."""
    bootstrap = Bootstrap(np.array([r.scene for r in records]))
    asked = [r.question for r in records]
    right, blind = np.array([(r.right, blind_answer(r.question) == r.question.answer) for r in records], float).T
    rows = []
    for name, mask in groups(asked).items():
        rate, low, high = bootstrap(right, mask)
        about = {"group": name, "questions": int(mask.sum()), "accuracy": rate, "low": low, "high": high}
        rows.append(about | {"blind": blind[mask].mean()})
    return rows


def main(argv: list[str] | None = None) -> None:
    """Ask the plain model, and print a table."""
    from rich.progress import track

    import pitome_mllm

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help='"tiny" or the folder of a model trained like it')
    parser.add_argument("--split", default="test", choices=SPLITS[1:])
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    args = parser.parse_args(argv)
    asked = score(*pitome_mllm.load(args.model, dtype="float32"), args.split, args.limit)
    rows = table(list(track(asked, "questions", total=args.limit or SCENES * PER_SCENE)))
    form = "{group}|{questions}|{accuracy:.3f}|{low:.3f} to {high:.3f}|{blind:.3f}"
    lines = (form.format(**row).split("|") for row in rows)
    print_table("|questions|accuracy|95 % interval|blind".split("|"), lines, f"{args.model}, {args.split}, plain")


if __name__ == "__main__":
    main()
