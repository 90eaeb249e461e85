"""Write the released model from a checkpoint.

``python -m pitome_mllm_eval.training.export_tiny RUN --to pitome_mllm/tiny``."""

import argparse
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch

from ..benchmark.questions import CATEGORIES
from ..benchmark.scenes import TIERS
from ..benchmark.score import score, table
from ..benchmark.sets import PER_SCENE, SCENES
from ..documents import markdown
from .tiny_batch import PHASES
from .tiny_model import SPECIAL, save_release, word_ids
from .train_tiny import Trainer

LIMIT_BYTES = 9_000_000
SAMPLE = 208  # questions on which the tests compare this machine with the recorded accuracy
CARD = Path(__file__).parent / "card.md"


def accuracy_table(results: dict[str, list[dict]]) -> str:
    """Markdown table, one column per split."""
    rows = {split: {row["group"]: row for row in found} for split, found in results.items()}
    lines = [["", *(f"{split} (questions)" for split in rows), "blind"]]
    for group in (g for g in ("all", *CATEGORIES, *TIERS) if all(g in by_group for by_group in rows.values())):
        found = [by_group[group] for by_group in rows.values()]
        cells = (f"{r['accuracy']:.3f} [{r['low']:.3f}, {r['high']:.3f}] ({r['questions']})" for r in found)
        lines.append([group, *cells, f"{found[-1]['blind']:.3f}"])
    return markdown(lines, len(lines[0]))


def measure(folder: Path, limit: int | None) -> tuple[dict[str, list[dict]], float]:
    """Plain accuracy of the written model on both splits, and on the first `SAMPLE` test questions."""
    from rich.progress import track
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    records = {
        split: list(track(score(model, processor, split, limit), split, total=limit or SCENES * PER_SCENE))
        for split in ("validation", "test")
    }
    sample = records["test"][:SAMPLE]
    return {split: table(r) for split, r in records.items()}, sum(r.right for r in sample) / len(sample)


def export(run: Path, target: Path, about: str = "", limit: int | None = None) -> dict[str, list[dict]]:
    """Write the release next to `target`, measure it, and move it into place file by file."""
    trainer = Trainer(PHASES)
    trainer.load(run)
    model, target = trainer.parts["model"], target.resolve()
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        folder = Path(temporary)
        save_release(model, folder)
        size = (folder / "model.safetensors").stat().st_size
        if size > LIMIT_BYTES:
            raise SystemExit(f"the weights take {size:,} bytes; the package has room for {LIMIT_BYTES:,}")
        results, sample = measure(folder, limit)
        recorded = {"sample": {"split": "test", "questions": SAMPLE, "accuracy": sample}, **results}
        (folder / "accuracy.json").write_text(json.dumps(recorded, indent=1) + "\n")
        shutil.copy(run / "log.csv", folder / "training_log.csv")
        card = CARD.read_text().format(
            parameters=sum(p.numel() for p in model.parameters()) / 1e6, words=len(word_ids()) - len(SPECIAL),
            about=about, pictures=trainer.log[-1]["pictures"], steps=trainer.step, accuracy=accuracy_table(results),
            sample=SAMPLE,
        )  # fmt: skip
        (folder / "README.md").write_text(card)
        names = sorted(p.name for p in folder.iterdir())
        sums = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
        (folder / "SHA256").write_text("".join(sums))
        for name in (*names, "SHA256"):
            (folder / name).chmod(0o644)
            os.replace(folder / name, target / name)
    return results


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder with checkpoint.pt and log.csv")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--about", default="seed 0, on 2 CPU cores", help="of the training run, for the model card")
    parser.add_argument("--limit", type=int, help="measure on the first so many questions only")
    args = parser.parse_args(argv)
    print(accuracy_table(export(args.run, args.to, args.about, args.limit)))


if __name__ == "__main__":
    main()
