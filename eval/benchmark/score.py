"""Accuracy on the benchmark: ``python -m pitome_mllm_eval.benchmark.score --limit 500``.

All questions on a picture share one tower pass and one prefill of the prompt up to the picture, through the model's own
forward, so whatever is attached to the model takes part.
"""

import argparse
import sys
from collections.abc import Iterator
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


def _split_prompt(model, processor, text: str) -> tuple[list[int], list[int]]:
    """Token ids up to and including the picture, and after it."""
    ids = processor.tokenizer(write(processor, [message(text, pictures=1)])).input_ids
    at = ids.index(model.config.image_token_id)
    return ids[:at] + [ids[at]] * model.config.image_seq_length, ids[at + 1 :]


@torch.inference_mode()
def answers(model, processor, picture, texts: list[str]) -> list[str]:
    """First word of the answer to each question on one picture."""
    pixels = processor.image_processor(images=picture, return_tensors="pt")["pixel_values"]
    prompts = [_split_prompt(model, processor, text) for text in texts]
    prefix = torch.tensor([prompts[0][0]], device=model.device)
    with _Positions(model) as positions:
        out = model(
            input_ids=prefix,
            attention_mask=torch.ones_like(prefix),
            pixel_values=pixels.to(model.device, model.dtype),
            use_cache=True,
            logits_to_keep=1,
        )
    cache = caches.cache_of(out)
    start = cache.get_seq_length() if positions.next is None else positions.next
    cache.batch_repeat_interleave(len(texts))
    lengths = [len(rest) for _, rest in prompts]
    pad = processor.tokenizer.pad_token_id
    rest = torch.tensor([ids + [pad] * (max(lengths) - len(ids)) for _, ids in prompts], device=model.device)
    states = model.model.language_model(
        input_ids=rest,
        **{caches.name_for(model.model.language_model): cache},
        position_ids=(start + torch.arange(rest.shape[1], device=model.device)).expand(len(texts), -1),
        cache_position=cache.get_seq_length() + torch.arange(rest.shape[1], device=model.device),
    ).last_hidden_state
    last = states[torch.arange(len(texts)), torch.tensor(lengths) - 1]
    return processor.tokenizer.convert_ids_to_tokens(model.lm_head(last).argmax(-1).tolist())


def score(model, processor, split: str = "test", limit: int | None = None) -> Iterator[Record]:
    """Answer the first `limit` questions of a split (all by default), picture by picture."""
    left = limit if limit is not None else sys.maxsize
    for number in range(SCENES):
        if left <= 0:
            return
        picture, asked = scene(number, split)
        asked = asked[:left]
        left -= len(asked)
        predicted = answers(model, processor, picture, [q.text for q in asked])
        yield from (_record(number, q, p) for q, p in zip(asked, predicted, strict=True))


def _record(number: int, question: Question, predicted: str) -> Record:
    return Record(
        number, question.tier, question.category, question.text, question.answer, predicted, blind_answer(question)
    )


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
