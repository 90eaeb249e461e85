"""Fine-tune the embedded model for few visual tokens.

``python -m pitome_mllm_eval.training.finetune --keep 72 --steps 300``.

LoRA adapters on the LLM and the projector learn from questions on training pictures, through the model's own forward
with merging on. The benchmark's questions are asked before and after; none of its pictures or digits is learned from.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pitome_mllm import attach
from pitome_mllm.methods import UserError

from ..accuracy.runs import load, provenance
from ..benchmark.bootstrap import Bootstrap
from ..benchmark.glyphs import SPLITS
from ..benchmark.score import score
from ..benchmark.sets import questions
from ..documents import write_csv
from ..provenance import RESULTS as FOLDER
from ..provenance import check_out
from .tiny_batch import IGNORE, Phase, training_batch
from .tiny_model import EOS, PAD, PREFIX, word_ids

RESULTS = FOLDER / "finetune.csv"
ADAPTED = r".*(language_model.*_proj|multi_modal_projector\.linear_[12])"
RANK, RATE, WARMUP, SEED = 16, 2e-3, 20, 0  # of adapters, learning rate at its highest, steps until then
PHASE = Phase("tune", steps=0, pictures=16, rows=4, chat_share=1.0)  # conversations of four questions


def inputs(batch: dict[str, Tensor], image: int, tokens: int) -> dict[str, Tensor]:
    """What the model's forward takes, one conversation for each picture of a training batch.

    ``batch`` has ``pixels`` (B, 3, H, W), ``tokens`` and ``labels`` (B, 1, T), which name the next token; ``image`` and
    ``tokens`` are id and number of the placeholders of a picture.
    """
    text, answers = batch["tokens"][:, 0], batch["labels"][:, 0]
    start = torch.tensor([word_ids()[word] for word in PREFIX] + [image] * tokens).expand(len(text), -1)
    ids = torch.cat([start, text], 1)
    labels = torch.full_like(ids, IGNORE)
    labels[:, start.shape[1] + 1 :] = answers[:, :-1]
    ids = torch.where(labels == EOS, labels, ids)  # rows end with an answer, whose end is a label only
    pixels = batch["pixels"].float() / 127.5 - 1
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": pixels, "labels": labels}


def tune(model: nn.Module, steps: int, rank: int = RANK) -> nn.Module:
    """Put LoRA adapters on ``model``, in place, and train them; merging, where it is attached, takes part."""
    from peft import LoraConfig, get_peft_model
    from rich.progress import track

    torch.manual_seed(SEED)
    config = model.config
    wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ADAPTED)).train()
    optimiser = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: min((n + 1) / WARMUP, 1 - n / steps))
    for step in track(range(steps), "training"):
        batch = training_batch(SEED, 0, PHASE, step)
        wrapped(**inputs(batch, config.image_token_id, config.image_seq_length)).loss.backward()
        nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    return wrapped.eval()


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Accuracy before and after, and the paired difference, with 95 % intervals over pictures."""

    def right() -> np.ndarray:
        return np.array([float(record.right) for record in score(model, processor, args.split, args.limit)])

    model, processor = load("tiny")
    plan = attach(model, args.method, published=True, keep=args.keep).plan
    before, start = right(), time.process_time()
    tune(model, args.steps)
    seconds = round(time.process_time() - start, 1)
    after = right()
    bootstrap = Bootstrap(np.array([scene for scene, _ in questions(args.split)][: args.limit]))
    settings = {name: getattr(plan, name) for name in ("method", "where", "keep")}
    settings |= {"steps": args.steps, "rank": RANK, "rate": RATE, "seed": SEED, "seconds": seconds}
    for what, values in {"before": before, "after": after, "difference": after - before}.items():
        figures = zip(("value", "low", "high"), bootstrap(values, np.ones(len(values), dtype=bool)))
        yield settings | {"what": what, "questions": len(values), **dict(figures)}


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=int, default=72)
    parser.add_argument("--method", default="pitome")
    parser.add_argument("--steps", type=int, default=300, help="each of 16 pictures, 4 questions on each")
    parser.add_argument("--split", default="test", choices=SPLITS[1:])
    parser.add_argument("--limit", type=int, help="ask only the first so many questions")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="CSV")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    about = provenance("tiny", args.split)
    try:
        check_out(args.out, RESULTS, args.limit is None and args.split == "test")
        rows = list(measure(args))
    except UserError as error:
        parser.error(str(error))
    write_csv(args.out, rows, about)
    for row in rows:
        print("{what}: {value:+.1%} ({low:+.1%} to {high:+.1%})".format(**row))


if __name__ == "__main__":
    main()
