"""Published tables of encoders alone: image-text retrieval, and classes of ImageNet by classifiers or by names."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from pitome_mllm import attach, estimate
from pitome_mllm.commands._options import progress
from pitome_mllm.loading import DTYPES, read_processor
from pitome_mllm.methods import UserError

from ..benchmark.bootstrap import DRAWS, span
from ..lmms.identity import identity, model_identity, short
from ..lmms.rows import Options, Row, beside
from ..lmms.tables import PLAIN, TASKS, Run, Table, own_config, published
from .pictures import CLASSES, Data, data_of

RANKS = (1, 5, 10)
FIGURES = tuple(f"{to} R@{k}" for to in ("text", "image") for k in RANKS)
PROMPT = "a photo of a {}."
READS = ("CLIPModel", "SiglipModel", "BlipForImageTextRetrieval")  # have embeddings of pictures and of texts
Said = Callable[[str], None]


class Encoder:
    """A model with its processor; what it makes of texts is kept, as merging does not change it."""

    def __init__(self, name: str, dtype: str | None, device: str | None) -> None:
        config = own_config(name)
        kind = (config.architectures or ["AutoModel"])[0]
        if kind not in READS and not kind.startswith("Auto") and "ForImageClassification" not in kind:
            raise UserError(
                f"{name!r} is a {kind}, which neither classifies pictures nor embeds texts; choose a classifier, or "
                f"{', '.join(READS)}"
            )
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.name, self._texts = name, dict[tuple[str, ...], Tensor]()
        made = getattr(transformers, kind).from_pretrained(name, dtype=DTYPES[dtype] if dtype else "auto")
        self.model = made.eval().to(self.device)

    @cached_property
    def processor(self) -> Any:
        kind = transformers.AutoImageProcessor if self.classifies else transformers.AutoProcessor
        return read_processor(kind, self.name)

    @property
    def classifies(self) -> bool:
        """Whether it has classes of its own."""
        return hasattr(self.model, "classifier") or hasattr(self.model, "cls_classifier")

    def images(self, data: Data, batch: int) -> Tensor:
        """Embeddings (N, C) of length 1, or the logits (N, classes) of a classifier."""
        found = []
        with progress(f"Looking at {len(data.pictures)} pictures", -(-len(data.pictures) // batch)) as advance:
            for pictures in data.batches(batch):
                pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
                found.append(self._image(pixels.to(self.device, self.model.dtype)).float().cpu())
                advance()
        return torch.cat(found) if self.classifies else nn.functional.normalize(torch.cat(found), dim=-1)

    def texts(self, texts: Iterable[str], batch: int) -> Tensor:
        """Embeddings (N, C) of length 1."""
        texts = tuple(texts)
        if texts not in self._texts:
            tokenizer = getattr(self.processor, "tokenizer", self.processor)
            tower = getattr(self.model.config, "text_config", None)
            reads_padding = self.model.config.model_type == "siglip"  # as it was trained
            padding = "max_length" if reads_padding else True
            longest = getattr(tower, "max_position_embeddings", None)
            found = []
            for start in range(0, len(texts), batch):
                asked = dict(padding=padding, truncation=True, max_length=longest, return_tensors="pt")
                inputs = tokenizer(list(texts[start : start + batch]), **asked).to(self.device)
                if reads_padding:
                    inputs.pop("attention_mask", None)
                found.append(self._text(inputs).float().cpu())
            self._texts[texts] = nn.functional.normalize(torch.cat(found), dim=-1)
        return self._texts[texts]

    def _image(self, pixels: Tensor) -> Tensor:
        if self.classifies:
            return self.model(pixels).logits
        if hasattr(self.model, "vision_proj"):  # BLIP
            return self.model.vision_proj(self.model.vision_model(pixels).last_hidden_state[:, 0])
        return _projected(self.model.get_image_features(pixel_values=pixels))

    def _text(self, inputs: Any) -> Tensor:
        if hasattr(self.model, "text_proj"):
            given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            return self.model.text_proj(self.model.text_encoder(**given).last_hidden_state[:, 0])
        return _projected(self.model.get_text_features(**inputs))


def _projected(output: Any) -> Tensor:
    """The embeddings; transformers 5.6 returns them as they are."""
    return output if isinstance(output, Tensor) else output.pooler_output


def recalls(images: Tensor, texts: Tensor, owner: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Hits and trials of each picture (N, 6): text by picture, picture by text, of the first 1, 5 and 10."""
    texts_found = _best(images, texts, owner) == torch.arange(len(images))[:, None]
    images_found = _best(texts, images, torch.arange(len(images))) == owner[:, None]
    by_text = _within(images_found)
    by_image = torch.zeros(len(images), len(RANKS)).index_add(0, owner, by_text)
    asked = torch.bincount(owner, minlength=len(images))[:, None].expand_as(by_image)
    hits = torch.cat([_within(texts_found), by_image], 1)
    return hits.numpy(), torch.cat([torch.ones_like(by_image), asked], 1).numpy()


def _best(asked: Tensor, among: Tensor, owner: Tensor) -> Tensor:
    """To whom the nearest of ``among`` belong (len(asked), 10)."""
    most = min(max(RANKS), len(among))
    return owner[torch.cat([(part @ among.T).topk(most).indices for part in asked.split(512)])]


def _within(hits: Tensor) -> Tensor:
    return torch.stack([hits[:, :k].any(1) for k in RANKS], 1).float()


def classified(encoder: Encoder, data: Data, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Hits and trials of each picture (N, 1)."""
    known = encoder.model.config.num_labels if encoder.classifies else len(data.classes)
    if known != len(data.classes):
        raise UserError(
            f"{encoder.name!r} knows {known} classes, the data have {len(data.classes)}; give a folder for each of its "
            "classes, in their order, which may be empty"
        )
    if not encoder.classifies:
        texts = encoder.texts(map(PROMPT.format, data.classes), batch)
    scores = encoder.images(data, batch)
    scores = scores if encoder.classifies else scores @ texts.T
    hits = (scores.argmax(1) == torch.tensor(data.labels)).float()[:, None].numpy()
    return hits, np.ones_like(hits)


def _evaluate(encoder: Encoder, name: str, data: Data, batch: int) -> tuple[np.ndarray, np.ndarray]:
    if name == CLASSES:
        return classified(encoder, data, batch)
    if encoder.classifies:
        raise UserError(f"{encoder.name!r} is a classifier, which embeds no captions; choose --task {CLASSES}")
    owner = torch.tensor([n for n, captions in enumerate(data.captions) for _ in captions])
    texts = encoder.texts((one for captions in data.captions for one in captions), batch)
    return recalls(encoder.images(data, batch), texts, owner)


def reproduce(name: str, table: Table, options: Options, say: Said) -> dict[Run, dict[str, Any]]:
    """Hits and trials of every run and task, from where they are already, or found now."""
    data = {task: data_of(task, options.data, options.limit) for task in table.tasks}
    load = options.load or {}
    if load.get("bits"):
        raise UserError("--bits is not possible with encoders alone; leave it out")
    how = {"dtype": load.get("dtype"), "data": {task: one.identity for task, one in data.items()}}
    found: dict[Run, dict[str, Any]] = {}
    encoder, models = None, {model: model_identity(model) for model in dict.fromkeys(run.model for run in table.runs)}
    for number, run in enumerate(table.runs, start=1):
        known = identity(run, table, None, models[run.model], how)
        here = options.out / name / f"{str(run).replace(',', '').replace(' ', '-')}-{short(known)}"
        for task in table.tasks:
            file = here / f"{task}.json"
            say(f"[{number}/{len(table.runs)}] {run}, {task}{' is there already' if file.is_file() else ''}")
            if not file.is_file():
                if encoder is None or encoder.name != run.model:
                    encoder = Encoder(run.model, load.get("dtype"), load.get("device"))
                _write(file, known, _run(encoder, run, task, data[task], options.batch_size))
            found.setdefault(run, {})[task] = one = json.loads(file.read_text())
            say(f"    {one['gflops']:.1f} GFLOPs and {one['ms']:.1f} ms a picture")
    return found


def _run(encoder: Encoder, run: Run, task: str, data: Data, batch: int) -> dict[str, Any]:
    merging = attach(encoder.model, **run.attached) if run.method != PLAIN else nullcontext()
    with torch.inference_mode(), merging as handle:
        start = time.perf_counter()
        hits, trials = _evaluate(encoder, task, data, batch)
        taken = 1000 * (time.perf_counter() - start) / len(data.pictures)
        flops = estimate(encoder.model, handle.plan if handle else None).flops
    return {"hits": hits.tolist(), "trials": trials.tolist(), "ms": taken, "gflops": flops / 1e9}


def _write(file: Path, known: Any, found: dict[str, Any]) -> None:
    """All of it, or nothing where it is cut off."""
    file.parent.mkdir(parents=True, exist_ok=True)
    (file.parent / "identity.json").write_text(json.dumps(known, indent=1))
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.rename(file)


def compare(name: str, table: Table, found: dict[Run, dict[str, Any]], group_a: bool = False) -> Iterator[Row]:
    """Every figure of every run with its interval over pictures, beside the published one."""
    known = published(name)
    for run, tasks in found.items():
        for task, one in tasks.items():
            hits, trials = np.array(one["hits"]), np.array(one["trials"])
            names = [*FIGURES, TASKS[task].metric] if hits.shape[1] > 1 else [TASKS[task].metric]
            drawn = np.stack(list(_drawn(hits, trials)))
            for title, values in zip(names, _with_sum(drawn).T, strict=True):
                yield beside(known, run, f"{task} {title}", len(hits), float(values[0]), *span(values[1:]))


def _drawn(hits: np.ndarray, trials: np.ndarray) -> Iterator[np.ndarray]:
    """The figures in per cent, then those of every draw of pictures."""
    random = np.random.default_rng(0)
    yield 100 * hits.sum(0) / trials.sum(0)
    for _ in range(DRAWS):
        drawn = np.bincount(random.integers(0, len(hits), len(hits)), minlength=len(hits))
        yield 100 * (drawn @ hits) / (drawn @ trials)


def _with_sum(drawn: np.ndarray) -> np.ndarray:
    return np.column_stack([drawn, drawn.sum(1)]) if drawn.shape[1] > 1 else drawn
