"""The phases of `gpu`: what each of them times, on models of random weights."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from datetime import date
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pitome_mllm import METHODS, Attachment, attach

from ..clocks import Call, in_turns, quantiles
from ..provenance import commit, processor_name
from .contenders import Slice, configuration, find_shape, random_model, twin
from .promises import BATCHES, LLM_BATCHES
from .stages import Load, captured, prompt

POINTS = {  # name -> where the tower merges, patches that leave it, metric
    "6 points": ((1, 4, 7, 10, 13, 16), 192, "hidden"),
    "5 points": ((0, 4, 8, 12, 16), 64, "keys"),
}
KEEP, TEXT = 64, 40
COLUMNS = "phase what mode batch ms p20 p80 share value device dtype shape torch transformers commit date".split()


def counts(points: tuple[int, ...], patches: int, left: int, blocks: int) -> list[int]:
    """Patch tokens after each merging block: the points remove equal shares."""
    found, done = [], 0
    for block in range(blocks):
        done += block in points
        found.append(round(patches * (left / patches) ** (done / len(points))))
    return found


class Bench:
    """A model of random weights, and copies of it that share them and merge."""

    def __init__(self, options: argparse.Namespace, llm: bool) -> None:
        self.device, self.repeats = torch.device(options.device), options.repeats
        self.often = 10 if self.device.type == "cuda" else 1  # what takes less time than its launch
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        config = configuration(find_shape("llava-1.5-7b"), None, tower_only=not llm)
        if options.shape == "tiny":
            shrink(config)
        torch.manual_seed(0)
        self.model = random_model(config, self.dtype, self.device)
        self.out, self.about = options.out, about(options, self.dtype)

    def plain(self) -> nn.Module:
        return twin(self.model)

    def merged(self, like: str, oracle: bool = False) -> nn.Module:
        """A model that merges at these `POINTS`, or slices there, or as ``attach`` does without anything said."""
        made = twin(self.model)
        if like == "default":
            attach(made, keep=KEEP, graph=False)
            return made
        points, left, metric = POINTS[like]
        vision = self.model.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        way = counts(points, patches, left, vision.num_hidden_layers - 1)
        settings = {"counts": way, "metric": metric, "graph": False}
        if oracle:
            settings |= {"metric": "hidden", "proportional_attention": False}
            attach(made, Slice(METHODS["pitome"].reducer()), **settings)
        else:
            attach(made, "pitome", published=True, **settings)
        return made

    def pixels(self, batch: int) -> Tensor:
        side = self.model.config.vision_config.image_size
        return torch.randn(batch, 3, side, side, device=self.device, dtype=self.dtype)

    def time(self, phase: str, mode: str, batch: int, calls: dict[str, Callable[[], Any]], times: int = 1) -> None:
        """Time calls in turns, and write their rows; shares are those of the first one.

        A call does the thing ``times`` times.
        """
        taken = in_turns({name: Call(run, times=times) for name, run in calls.items()}, self.device, self.repeats, 3)
        base = quantiles(next(iter(taken.values())))[1]
        for what, times in taken.items():
            low, middle, high = quantiles(times)
            timed = {"ms": round(middle, 4), "p20": round(low, 4), "p80": round(high, 4)}
            self.write(phase, what, mode, batch, share=round(middle / base, 4), **timed)

    def write(self, phase: str, what: str, mode: str, batch: int, **values: Any) -> None:
        row = {"phase": phase, "what": what, "mode": mode, "batch": batch, **values, **self.about}
        new = not self.out.exists()
        with self.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(row)


def shrink(config: Any) -> None:
    """Make a model for rehearsals of it, with as many patches and blocks of the tower."""
    for part, most in ((config.vision_config, 24), (config.text_config, 2)):
        part.hidden_size = part.intermediate_size = 64
        part.num_hidden_layers = min(most, part.num_hidden_layers)
        part.num_attention_heads = part.num_key_value_heads = 2
        part.head_dim = 32


def about(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, str]:
    """What every row says about the run."""
    import transformers

    return {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else processor_name(),
        "dtype": str(dtype).removeprefix("torch."),
        "shape": options.shape,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "date": date.today().isoformat(),
    }


# ---- phases ----------------------------------------------------------------------------------------------------------


def often(call: Callable[[], Any], times: int) -> None:
    """Make a call several times."""
    for _ in range(times):
        call()


def run_tower(model: nn.Module, pixels: Tensor) -> Tensor:
    """What the projector reads."""
    output = model.model.vision_tower(pixels, output_hidden_states=True)
    return output.hidden_states[model.config.vision_feature_layer]


def tower(bench: Bench) -> None:
    """The vision tower, plain, merged and as an oracle has it; captured, eager, and by ``graph=True``."""
    models = {"plain": bench.plain()} | {name: bench.merged(name) for name in POINTS}
    models |= {f"oracle of {name}": bench.merged(name, oracle=True) for name in POINTS}
    for batch in BATCHES:
        pixels = bench.pixels(batch)
        calls = {name: partial(run_tower, model, pixels) for name, model in models.items()}
        graphs = {name: captured(call, bench.device) for name, call in calls.items()}
        several = {name: partial(often, graph, bench.often) for name, graph in graphs.items()}
        bench.time("tower", "captured", batch, several, bench.often)
        del graphs, several
        bench.time("tower", "eager", batch, calls)
        for name in POINTS:
            Attachment.of(models[name]).update(graph=True)
        bench.time("tower", "graph", batch, calls)
        for name in POINTS:
            Attachment.of(models[name]).update(graph=False)


def merge(bench: Bench) -> None:
    """One merge of 577 tokens, by keys and by hidden states, captured."""
    width, reducer = bench.model.config.vision_config.hidden_size, METHODS["pitome"].reducer()
    for batch in LLM_BATCHES:
        x = torch.randn(batch, 577, width, device=bench.device, dtype=bench.dtype)
        size = torch.ones(batch, 577, 1, device=bench.device)

        def once(metric: Tensor, x: Tensor = x, size: Tensor = size) -> Tensor:
            return reducer.match(metric, 150, size=size, protected=1, depth=0.3).reduce(x, size)[0]

        calls = {
            "keys": lambda x=x: once(x.unflatten(-1, (-1, 64)).mean(2)),
            "hidden states": partial(once, x),
        }
        graphs = {name: captured(partial(often, call, bench.often), bench.device) for name, call in calls.items()}
        bench.time("merge", "captured", batch, graphs, bench.often)  # one graph of several, launched once


def prefill(bench: Bench) -> None:
    """Tower, projector and LLM over the prompt, captured as one graph."""
    for batch in LLM_BATCHES:
        calls = {}
        for name in ("plain", "default", "5 points"):
            model = bench.plain() if name == "plain" else bench.merged(name)
            calls[name] = captured(partial(run_prefill, model, bench.pixels(batch), text(bench, batch)), bench.device)
        bench.time("prefill", "captured", batch, calls)


def text(bench: Bench, batch: int) -> Tensor:
    width = bench.model.config.text_config.hidden_size
    return torch.randn(batch, TEXT, width, device=bench.device, dtype=bench.dtype)


def run_prefill(model: nn.Module, pixels: Tensor, text: Tensor) -> Tensor:
    """The logits behind the prompt."""
    features = run_tower(model, pixels)[:, 1:]
    embeds = torch.cat([model.model.multi_modal_projector(features), text], 1)
    states = model.model.language_model(inputs_embeds=embeds, use_cache=True).last_hidden_state
    return model.lm_head(states[:, -1])


def first_token(bench: Bench) -> None:
    """generate() of one token: all that surrounds prefill too."""
    models = {"plain": bench.plain(), "default": bench.merged("default"), "5 points": bench.merged("5 points")}
    for batch in LLM_BATCHES:
        load = Load(batch, 1, TEXT, 1, None)
        inputs = prompt(bench.model, load, bench.pixels(batch))
        calls = {name: partial(run_generate, model, inputs) for name, model in models.items()}
        bench.time("first token", "eager", batch, calls)
        for model in models.values():
            if handle := Attachment.of(model):
                handle.update(graph=True)
        bench.time("first token", "graph", batch, calls)
        for model in models.values():
            if handle := Attachment.of(model):
                handle.update(graph=False)


def run_generate(model: nn.Module, inputs: dict[str, Tensor], new_tokens: int = 1) -> Tensor:
    return model.generate(
        **inputs, min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False, num_beams=1, pad_token_id=0
    )


def bits(bench: Bench) -> None:
    """How many different results 20 runs of a method give, eager and by a graph; 1 is what is promised."""
    pixels = bench.pixels(2)
    for method in METHODS:
        model = twin(bench.model)
        with attach(model, method, keep=144, graph=False) as handle:
            runs = {"eager": [run_tower(model, pixels) for _ in range(20)]}
            handle.update(graph=True)
            runs["graph and eager"] = [runs["eager"][0], *(run_tower(model, pixels) for _ in range(20))]
            for mode, made in runs.items():
                different: list[Tensor] = []
                for each in made:
                    if not any(torch.equal(each, other) for other in different):
                        different.append(each)
                bench.write("bits", method, mode, 2, value=len(different))


def memory(bench: Bench) -> None:
    """Most memory beside the weights, MiB: of the tower, and of generate() of one token."""
    for batch in LLM_BATCHES:
        pixels = bench.pixels(batch)
        inputs = prompt(bench.model, Load(batch, 1, TEXT, 1, None), pixels)
        for name in ("plain", "default", *POINTS):
            model = bench.plain() if name == "plain" else bench.merged(name)
            stages = {"tower": partial(run_tower, model, pixels), "first token": partial(run_generate, model, inputs)}
            for stage, call in stages.items():
                bench.write("memory", f"{name}, {stage}", "eager", batch, value=peak(call, bench.device))
                if handle := Attachment.of(model):
                    handle.update(graph=True)
                    bench.write("memory", f"{name}, {stage}", "graph", batch, value=peak(call, bench.device))
                    handle.update(graph=False)
            del stages, call, model


def peak(call: Callable[[], Any], device: torch.device) -> float:
    """MiB that torch takes from the device at most, beside what it held before the first call: graphs' pools too."""
    if device.type != "cuda":
        call()
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_reserved() - before) / 2**20, 1)
