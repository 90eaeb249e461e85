"""How fast it is: every stage of a model timed apart, plain, with every method, and as oracles would have it.

The command is ``pitome-mllm bench``, or ``python eval/bench.py`` in a checkout.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from pitome_mllm.families.geometry import geometry
from pitome_mllm.loading import DTYPES
from pitome_mllm.methods import UserError, unknown

from ..clocks import Call, clock_name, in_turns, peak_bytes, quantiles
from ..documents import append
from ..provenance import about_machine, check_commit
from .contenders import MODES, ORACLE, Contender, configuration, contenders, find_shape, parted, random_model
from .rows import Row, show
from .stages import EAGER, IN_FRONT, MERGES, STAGES, Load, Stages

Figure = TypeVar("Figure")
Key = tuple[str, int]  # stage, number of the contender
ATTENTION_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def bench(options: argparse.Namespace) -> None:
    """Measure what the command line asks for.

    Raises
    ------
    ValueError : options that are not possible.
    """
    device, wanted = _check(options), _stages(options)
    torch.set_num_threads(options.threads)
    about = _about(options, device)
    if options.out:
        check_commit(options.out, about["commit"])
    model, processor, images = _model(options, device)
    amounts = [{"ratio": r} for r in options.ratio] if options.ratio else [{"keep": k} for k in options.keep or [144]]
    rows = []
    with torch.inference_mode():
        field = list(contenders(model, options.methods, amounts))
        for batch in options.batch:
            load = Load(batch, options.images or images, options.text_tokens, options.new_tokens, processor)
            measured = list(measure(field, load, wanted, options.mode, options.repeats, about["warmup"]))
            if options.out:  # a larger batch may not fit
                append(options.out, measured, about)
            rows += measured
    show(rows, about)


def _check(options: argparse.Namespace) -> torch.device:
    """The device; ValueError for what is not possible."""
    for name, least in (("threads", 1), ("text_tokens", 1), ("new_tokens", 2), ("repeats", 1), ("warmup", 1)):
        if getattr(options, name) < least:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(options, name)} is not possible; give {least} or more"
            )
    if min(options.batch) < 1 or (options.images or 1) < 1:
        raise UserError(f"--batch {min(options.batch)} --images {options.images} is not possible; give 1 or more")
    for name, choices in (("dtype", DTYPES), ("mode", MODES)):
        if getattr(options, name) not in choices:
            raise UserError(unknown(name, getattr(options, name), choices))
    for name in {*options.methods} - {ORACLE}:
        parted(name)
    for stage in options.stages or ():
        if stage not in STAGES:
            raise UserError(unknown("stage", stage, STAGES))
    if options.shape is None and (options.layers is not None or options.tower_only):
        raise UserError("--layers and --tower-only cut down a --shape; name one, such as --shape llava-1.5-7b")
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {options.device} is not possible; choose cpu, cuda or cuda:0") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device} is not there; choose cpu")
    if options.mode == "graph" and device.type != "cuda":
        raise UserError(f"--mode graph needs a CUDA device, got {device}; choose eager")
    return device


def _stages(options: argparse.Namespace) -> list[str]:
    """The stages to time, in their order."""
    possible = IN_FRONT if _only_tower(options) else STAGES
    possible = [stage for stage in possible if options.mode == "eager" or stage not in EAGER]
    wanted = [stage for stage in possible if stage in (options.stages or possible)]
    if len(wanted) < len(options.stages or ()):
        raise UserError(f"--stages: possible here are {', '.join(map(repr, possible))}")
    return wanted


def _only_tower(options: argparse.Namespace) -> bool:
    return bool(options.tower_only or (options.shape and find_shape(options.shape).text is None))


def _model(options: argparse.Namespace, device: torch.device) -> tuple[Any, Any, int]:
    """The plain model, what prepares its pictures, and how many of them a row has."""
    if options.shape is None:
        from pitome_mllm import load

        model, processor = load(options.model, dtype=options.dtype, device=device)
        processor, images = processor.image_processor, 1
        check_family(model.config)
    else:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        shape = find_shape(options.shape)
        config, images = configuration(shape, options.layers, options.tower_only), shape.images
        side = config.vision_config.image_size
        processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        model = random_model(config, DTYPES[options.dtype], device)
    if options.attention != "sdpa":
        try:
            model.set_attn_implementation({"text_config": options.attention})
        except ImportError as error:
            raise UserError(f"--attention {options.attention} is not installed: {error}") from error
    return model, processor, images


def check_family(config: Any) -> None:
    """ValueError for a family whose pictures the stages cannot make: of several tiles, or of several feature layers."""
    found = geometry(config)
    if found.family.tiles or len(found.layers) > 1 or config.model_type == "video_llava":
        raise UserError(
            f"{config.model_type!r} takes its pictures in tiles, several layers or beside videos, which bench does not "
            "make; choose a family of one tile, such as LLaVA-1.5, or for LLaVA-NeXT's sizes --shape llava-next-7b"
        )


def measure(
    field: list[Contender], load: Load, wanted: list[str], mode: str, repeats: int, warmup: int
) -> Iterator[Row]:
    """One row for every stage of every contender."""
    from rich.progress import Progress

    device = field[0].model.device
    peak = once(field, load, wanted, lambda call: peak_bytes(call, device))
    flops = once(field, load, [stage for stage in wanted if stage not in EAGER], counted)
    stages = [Stages(contender, load, mode) for contender in field]
    made = {(stage, number): stages[number].call(stage) for number in range(len(field)) for stage in wanted}
    calls = {key: call for key, call in made.items() if call is not None}
    cached = ("first token", "decode")
    kv = {key: stages[key[1]].kv_bytes() for key in calls if key[0] in cached}
    with Progress(transient=True) as bar:
        task = bar.add_task(f"batch {load.batch}", total=len(calls) * (repeats + warmup))
        taken = in_turns(calls, device, repeats, warmup, lambda: bar.advance(task))
    for key, times in taken.items():
        stage, number = key
        against = ("tower", number) if stage in MERGES else (stage, 0)
        yield _row(
            key,
            field[number],
            load,
            stages[number].keep,
            times,
            taken.get(against),
            flops.get(key, ""),
            kv.get(key, ""),
            peak[key],
        )


def once(field: list[Contender], load: Load, wanted: list[str], look: Callable[[Call], Figure]) -> dict[Key, Figure]:
    """What ``look`` sees in every stage, eagerly, each alone with the weights: nothing of the others is alive."""
    found = {}
    for number, contender in enumerate(field):
        for stage in wanted:
            call = Stages(contender, load).call(stage)
            if call is not None:
                found[stage, number] = look(call)
            del call
    return found


def counted(call: Call) -> float:
    """10^9 floating-point operations of one turn; torch by itself leaves attention on processors out."""

    def attention(query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
        return sdpa_flop_count(query, key, value)

    with FlopCounterMode(display=False, custom_mapping={ATTENTION_ON_CPU: attention}) as counter:
        call.run()
    return round(counter.get_total_flops() / 1e9, 3)


def _row(
    key: Key, contender: Contender, load: Load, keep: int, times: list[float], base: list[float] | None,
    flops: float | str, kv: int | str, peak: int,
) -> Row:  # fmt: skip
    low, middle, high = (round(q, 4) for q in quantiles(times))
    share = ("", "", "")
    if base:
        share = tuple(round(q, 5) for q in quantiles(np.array(times) / np.array(base)))
    return Row(
        stage=key[0],
        method=contender.method,
        variant=contender.variant,
        like=contender.like,
        where=contender.plan.where if contender.plan else "",
        keep=keep,
        rho=contender.asked.get("ratio", ""),
        batch=load.batch,
        images=load.images,
        text_tokens=load.text_tokens,
        ms=middle,
        p20=low,
        p80=high,
        against="own tower" if key[0] in MERGES else "plain",
        ratio=share[1],
        ratio_p20=share[0],
        ratio_p80=share[2],
        gflops=flops,
        kv_bytes=kv,
        peak_bytes=peak,
    )


def _about(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What every row says about the run."""
    known = about_machine()
    return {
        "model": options.model if options.shape is None else find_shape(options.shape).title,
        "llm_layers": "none" if _only_tower(options) else options.layers or "all",
        "dtype": options.dtype,
        "attention": options.attention,
        "mode": options.mode,
        "clock": clock_name(device),
        "repeats": options.repeats,
        "warmup": options.warmup,
        "new_tokens": options.new_tokens,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else known["device"],
        "threads": torch.get_num_threads(),
        **{name: known[name] for name in ("torch", "transformers", "pitome_mllm", "commit", "date")},
    }
