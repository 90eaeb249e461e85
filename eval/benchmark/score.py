"""Accuracy on the benchmark: ``python -m pitome_mllm_eval.benchmark.score --limit 500``.

All questions on a picture share one tower pass and one prefill of the prompt up to the picture, through the model's own
forward, so whatever is attached to the model takes part. An answer is the likeliest next token: all are single words.
"""

import argparse
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pitome_mllm.hooks import caches
from pitome_mllm.serving.prompts import message, write

from ..documents import write_csv
from .bootstrap import Bootstrap, groups
from .glyphs import SPLITS
from .questions import Question
from .sets import PER_SCENE, SCENES, blind_answer, scene

BATCH = 4  # pictures that are answered at once


@dataclass(frozen=True)
class Record:
    """One answered question."""

    scene: int
    tier: str
    category: str
    question: str
    answer: str
    predicted: str
    blind: str

    @property
    def right(self) -> bool:
        """Whether the model's answer is the true one."""
        return self.predicted == self.answer


@dataclass(frozen=True)
class Prompts:
    """Questions on one picture (1, 3, H, W): token ids up to and with the picture, and what follows of each."""

    pixels: torch.Tensor
    prefix: list[int]
    rest: list[list[int]]
    pad: int


class _Positions:
    """Notes the largest position of the prefill: an attached reducer may keep the original ones."""

    def __init__(self, model):
        self.handle = model.model.language_model.register_forward_pre_hook(self._note, with_kwargs=True)
        self.next: int | None = None

    def _note(self, module, args, kwargs) -> None:
        positions = kwargs.get("position_ids")
        self.next = None if positions is None else int(positions.max()) + 1

    def __enter__(self) -> "_Positions":
        return self

    def __exit__(self, *exc) -> None:
        self.handle.remove()


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
    with _Positions(model) as positions:
        out = model(
            input_ids=prefix,
            attention_mask=torch.ones_like(prefix),
            pixel_values=pixels.to(device, model.dtype),
            use_cache=True,
            logits_to_keep=1,
        )
    cache = caches.cache_of(out)
    start = cache.get_seq_length() if positions.next is None else positions.next
    most = max(len(one.rest) for one in asked)
    cache.batch_repeat_interleave(most)
    ids = [row for one in asked for row in one.rest + one.rest[:1] * (most - len(one.rest))]
    lengths = torch.tensor([len(row) for row in ids])
    width = int(lengths.max())
    rest = torch.tensor([row + [asked[0].pad] * (width - len(row)) for row in ids], device=device)
    states = model.model.language_model(
        input_ids=rest,
        **{caches.name_for(model.model.language_model): cache},
        position_ids=(start + torch.arange(width, device=device)).expand(len(ids), -1),
        cache_position=cache.get_seq_length() + torch.arange(width, device=device),
    ).last_hidden_state
    found = model.lm_head(states[torch.arange(len(ids)), lengths - 1]).argmax(-1).view(-1, most).tolist()
    return [token for one, row in zip(asked, found, strict=True) for token in row[: len(one.rest)]]


def answers(model, processor, picture, texts: list[str]) -> list[str]:
    """First word of the answer to each question on one picture."""
    asked = prompts(processor, model.config.image_token_id, model.config.image_seq_length, picture, texts)
    return processor.tokenizer.convert_ids_to_tokens(predict(model, [asked]))


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
    """The answers to the first ``limit`` questions of a split, beside the true ones and those without looking."""
    for number, q, answer in predicted(model, processor, split, limit):
        yield Record(number, q.tier, q.category, q.text, q.answer, answer, blind_answer(q))


def table(records: list[Record]) -> list[dict]:
    """Accuracy, interval and blind baseline: overall, per category and per tier."""
    bootstrap = Bootstrap(np.array([r.scene for r in records]))
    right, blind = np.array([(r.right, r.blind == r.answer) for r in records], float).T
    rows = []
    for name, mask in groups(records).items():
        rate, low, high = bootstrap(right, mask)
        about = {"group": name, "questions": int(mask.sum()), "accuracy": rate, "low": low, "high": high}
        rows.append(about | {"blind": blind[mask].mean()})
    return rows


def _show(rows: list[dict], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    view = Table("", "questions", "accuracy", "95 % interval", "blind", title=title)
    for row in rows:
        span = f"{row['low']:.3f} - {row['high']:.3f}"
        view.add_row(row["group"], str(row["questions"]), f"{row['accuracy']:.3f}", span, f"{row['blind']:.3f}")
    Console().print(view)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    from rich.progress import track

    import pitome_mllm

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help='"tiny" or the folder of a model trained like it')
    parser.add_argument("--split", default="test", choices=SPLITS[1:])
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument(
        "--keep", type=float, help="visual tokens to keep (number, or fraction up to 1); default: plain"
    )
    parser.add_argument("--method", help="reduction method; default: the package's")
    parser.add_argument("--save", type=Path, metavar="CSV", help="write every answer")
    parser.add_argument("--threads", type=int, help="processor threads")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    model, processor = pitome_mllm.load(args.model, dtype="float32")
    title = f"{args.model}, {args.split}, plain"
    if args.keep is not None:
        keep = int(args.keep) if args.keep > 1 else args.keep
        pitome_mllm.attach(model, *filter(None, [args.method]), keep=keep)
        title = f"{args.model}, {args.split}, {args.method or 'default'} keep={keep}"
    total = args.limit or SCENES * PER_SCENE
    records = list(track(score(model, processor, args.split, args.limit), "questions", total=total))
    _show(table(records), title)
    if args.save:
        write_csv(args.save, records)


if __name__ == "__main__":
    main()
