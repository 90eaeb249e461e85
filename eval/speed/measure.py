"""How fast a model is on this device, plain and merging: ``pitome-mllm bench``, or ``python eval/bench.py``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from pitome_mllm import METHODS, Attachment, attach
from pitome_mllm.commands._options import open_model, progress
from pitome_mllm.commands._report import print_table
from pitome_mllm.costs.latency import in_turns, measure, milliseconds, runs_alone, timed
from pitome_mllm.costs.published import get_shape
from pitome_mllm.families.features import tower_features
from pitome_mllm.families.geometry import geometry
from pitome_mllm.loading import DTYPES
from pitome_mllm.methods import UserError, unknown

from .models import configuration, merging, prompt, random_model, share_weights, slice_like
from .sheet import Row, Sheet, timing

PLAIN, ORACLE, OVER_SLICING = "plain", "oracle", "over slicing"
VARIANTS = {"published": {"published": True}, "keys": {"metric": "keys"}, "hidden": {"metric": "hidden"}}
PHASES = {"tower": "tower_ms", "first token": "prefill_ms", "decode": "per_token_ms"}  # field of AnswerCost
NEW_TOKENS = 8


@dataclass(frozen=True)
class Contender:
    """A model in the comparison, and what is put on it: nothing on the plain one."""

    name: str
    model: Any
    handle: Attachment | None = None

    @property
    def is_oracle(self) -> bool:
        return self.name.startswith(ORACLE)


def bench(options: argparse.Namespace) -> None:
    """Measure what the command line asks for."""
    device = _check(options)
    torch.set_num_threads(options.threads)
    sheet = Sheet(options.out, device, DTYPES[options.dtype], _title(options))
    model, images = _model(options, device)
    amounts = [{"ratio": r} for r in options.ratio] if options.ratio else [{"keep": k} for k in options.keep or [144]]
    with torch.inference_mode():
        field = list(contenders(model, options.methods, amounts))
        for batch in options.batch:  # written one by one: a larger one may not fit
            sheet.add(*rows(field, batch, images, options.repeats))
    show(sheet)


def _check(options: argparse.Namespace) -> torch.device:
    """The device; ValueError for what is not possible."""
    if options.dtype not in DTYPES:
        raise UserError(unknown("dtype", options.dtype, DTYPES))
    for name in {*options.methods} - {ORACLE}:
        split(name)
    if options.methods[0] == ORACLE:
        raise UserError("--methods begins with the oracle, which slices like the first method; name that before it")
    if options.shape is None and options.layers is not None:
        raise UserError("--layers cuts down a --shape; name one, such as --shape llava-1.5-7b")
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {options.device} is not possible; choose cpu, cuda or cuda:0") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device} is not there; choose cpu")
    return device


def split(name: str) -> tuple[str, dict[str, Any]]:
    """A method, and the settings that "METHOD:VARIANT" has beyond its name; ValueError for what there is not."""
    method, _, variant = name.partition(":")
    if method not in METHODS:
        raise UserError(unknown("method", method, METHODS))
    if variant and variant not in VARIANTS:
        raise UserError(unknown(f"variant of {method}", variant, VARIANTS))
    return method, VARIANTS.get(variant, {})


def _title(options: argparse.Namespace) -> str:
    """What is measured, in words."""
    if options.shape is None:
        return str(options.model)
    layers = 0 if get_shape(options.shape).text is None else options.layers
    part = {None: "", 0: ", the tower alone"}.get(layers, f", {layers} LLM blocks")
    return get_shape(options.shape).title.partition(",")[0] + part


def _model(options: argparse.Namespace, device: torch.device) -> tuple[Any, int]:
    """The plain model, and how many pictures a row has."""
    if options.shape is not None:
        shape = get_shape(options.shape)
        return random_model(configuration(shape, options.layers), DTYPES[options.dtype], device), shape.images
    model, _ = open_model(options)
    check_family(model.config)
    return model, 1


def check_family(config: Any) -> None:
    """ValueError for a family whose pictures `prompt` cannot make: of several tiles, or of several feature layers."""
    found = geometry(config)
    if found.family.tiles or len(found.layers) > 1 or config.model_type == "video_llava":
        raise UserError(
            f"{config.model_type!r} takes its pictures in tiles, several layers or beside videos, which bench does not "
            "make; choose a family of one tile, such as LLaVA-1.5, or for LLaVA-NeXT's sizes --shape llava-next-7b"
        )


def contenders(model: Any, methods: list[str], amounts: list[dict[str, Any]]) -> Iterator[Contender]:
    """The plain model, and every method at every amount of `attach`; an oracle goes the way of the first method."""
    yield Contender(PLAIN, share_weights(model))
    for asked in amounts:
        amount = ", ".join(f"{'' if name == 'keep' else name + ' '}{value:g}" for name, value in asked.items())
        made: list[Contender] = []
        for name in methods:
            own = share_weights(model)
            if name == ORACLE:
                if not made[0].handle.plan.merging:
                    raise UserError(
                        f"the oracle slices like {methods[0]}, which does not merge in the tower; leave it out"
                    )
                slice_like(own, made[0].handle)
            else:
                method, more = split(name)
                attach(own, method, **asked, **more)
            shown = f"{name} of {methods[0]}" if name == ORACLE else name
            made.append(Contender(f"{shown}, {amount}", own, Attachment.of(own)))
        yield from made


def rows(field: list[Contender], batch: int, images: int, repeats: int) -> Iterator[Row]:
    """What answers cost, in turns, part by part; of oracles and of towers alone their tower, and merging by itself."""
    model = field[0].model
    inputs, own = prompt(model, batch, images), runs_alone(model.device)
    alone = model.config.text_config.num_hidden_layers == 0
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for each in field:
        tower = each.is_oracle or alone
        calls[each.name, "answer"] = (
            partial(_tower, each.model, inputs["pixel_values"], own) if tower
            else partial(measure, each.model, inputs, new_tokens=NEW_TOKENS, own=own)
        )  # fmt: skip
        if each.handle and each.handle.plan.steps and not each.is_oracle:
            merge = merging(each.model, each.handle.plan, batch * images)
            calls[each.name, "merge"] = partial(milliseconds, merge, model.device)
    warmup = 2 if model.device.type == "cuda" else 1  # the second call makes graphs
    with progress(f"Timing batch {batch}", len(calls) * (repeats + warmup)) as advance:
        taken = in_turns(calls, repeats, warmup, advance)
    for each in field:
        for phase, name in PHASES.items():
            ms, base = ([getattr(cost, name) for cost in taken[who, "answer"]] for who in (each.name, PLAIN))
            if ms[0] is not None:
                yield timing(phase, each.name, "eager", batch, ms, base)
            if phase == "tower" and (each.name, "merge") in taken:
                yield timing("merge", each.name, "eager", batch, taken[each.name, "merge"], ms)
            if phase == "tower" and each.is_oracle:
                like = each.name.removeprefix(f"{ORACLE} of ")
                merged = [cost.tower_ms for cost in taken[like, "answer"]]
                yield timing(OVER_SLICING, like, "eager", batch, merged, ms)


def _tower(model: Any, pixels: torch.Tensor, own: bool) -> Any:
    """What the tower costs by itself."""
    with timed(model, own) as clock:
        tower_features(model, pixels)
    return clock.cost()


def show(sheet: Sheet) -> None:
    """A table in the terminal for every batch: contenders down, phases across."""
    about, phases = sheet.about, [p for p in dict.fromkeys(row.phase for row in sheet.rows) if p != OVER_SLICING]
    how = (
        f"{about['device']}, {about['dtype']}, torch {about['torch']}: medians of rounds in turns. In brackets the "
        "share of the plain model's, of merging that of its own tower. Decode: each new token after the first."
    )
    for batch in dict.fromkeys(row.batch for row in sheet.rows):
        cells = {(row.what, row.phase): row for row in sheet.rows if row.batch == batch}
        whats = dict.fromkeys(row.what for row in cells.values())
        lines = ([what, *(cell(cells.get((what, phase))) for phase in phases)] for what in whats)
        print_table(["", *(f"{phase}, ms" for phase in phases)], lines, f"{about['shape']}, batch {batch}", [how])


def cell(row: Row | None) -> str:
    """Milliseconds, and the share."""
    if row is None:
        return ""
    return f"{row.ms:.4g}" + ("" if row.what == PLAIN else f" ({np.format_float_positional(row.share, 3)})")
