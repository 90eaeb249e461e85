"""What `gpu` times and counts, on a model of random weights whose shape is LLaVA-1.5-7B's."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pitome_mllm import METHODS, Attachment, attach
from pitome_mllm.costs.published import get_shape
from pitome_mllm.hooks.capture import Capture, new_pool

from .models import configuration, prompt, random_model, share_weights, slice_like
from .sheet import Row, Sheet

BATCHES, LLM_BATCHES = (1, 4, 16), (1, 16)
POINTS = {  # name -> where the tower merges, patches that leave it, metric
    "5 points": ((0, 4, 8, 12, 16), 64, "keys"),
    "6 points": ((1, 4, 7, 10, 13, 16), 192, "hidden"),
}
KEEP, KEEPS = 64, (288, 144, 72)  # visual tokens that are left; those of the README
MODES = {"eager": False, "graph": "auto", "graphs": True}  # of generate(), by what `graph` is
OFTEN, MERGES = 10, 100  # calls of a captured tower, and merges in one graph, that are timed as one


def counts(points: tuple[int, ...], patches: int, left: int, blocks: int) -> list[int]:
    """Patch tokens after each merging block: the points remove equal shares."""
    done = [sum(point <= block for point in points) / len(points) for block in range(blocks)]
    return [round(patches * (left / patches) ** share) for share in done]


class Bench:
    """A model of random weights, and copies of it that share them and merge."""

    def __init__(self, options: argparse.Namespace, layers: int | None) -> None:
        self.device, self.repeats = torch.device(options.device), options.repeats
        self.gpu = self.device.type == "cuda"
        config = configuration(get_shape("llava-1.5-7b"), layers)
        if options.shape == "tiny":
            shrink(config)
        torch.manual_seed(0)
        dtype = torch.bfloat16 if self.gpu else torch.float32
        self.sheet = Sheet(options.out, self.device, dtype, options.shape)
        self.model = random_model(config, dtype, self.device)

    def merged(self, like: str) -> nn.Module:
        """A plain model, one that merges at these `POINTS` or slices there, or as `attach` does with nothing said.

        "pitome, 144" is the latter too, with so many visual tokens.
        """
        made = share_weights(self.model)
        if like == "default" or ", " in like:
            attach(made, keep=KEEP if like == "default" else int(like.split(", ")[1]), graph=False)
        elif like != "plain":
            points, left, metric = POINTS[like.removeprefix("oracle of ")]
            vision = self.model.config.vision_config
            patches = (vision.image_size // vision.patch_size) ** 2
            way = counts(points, patches, left, vision.num_hidden_layers - 1)
            handle = attach(made, "pitome", published=True, counts=way, metric=metric, graph=False)
            if like.startswith("oracle"):
                handle.remove()
                slice_like(made, handle)
        return made

    def captured(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """``call`` as a CUDA graph, which writes over what it made; itself on a processor, which has none."""
        if not self.gpu:
            return call
        call()
        return partial(Capture(call, [], new_pool(), self.device).replay, [], lambda made: made)

    def time(self, phase: str, mode: str, batch: int, calls: dict[str, Callable[[], Any]], times: int = 1) -> None:
        """Rows of calls in turns, each of which does its thing so many times."""
        self.sheet.time(phase, mode, batch, calls, self.repeats, times)


def shrink(config: Any) -> None:
    """Make a model for rehearsals of it, with as many patches and blocks of the tower."""
    for part, most in ((config.vision_config, 24), (config.text_config, 2)):
        part.hidden_size = part.intermediate_size = 64
        part.num_hidden_layers = min(most, part.num_hidden_layers)
        part.num_attention_heads = part.num_key_value_heads = 2
        part.head_dim = 32


def often(call: Callable[[], Any], times: int) -> None:
    """Make a call several times."""
    for _ in range(times):
        call()


# ---- phases ----------------------------------------------------------------------------------------------------------


def tower(bench: Bench) -> None:
    """The vision tower, plain, merging and as an oracle has it; captured, and eager."""
    models = {name: bench.merged(name) for each in POINTS for name in ("plain", each, f"oracle of {each}")}
    for batch in BATCHES:
        pixels = prompt(bench.model, batch)["pixel_values"]
        calls = {name: partial(run_tower, model, pixels) for name, model in models.items()}
        times = OFTEN if bench.gpu else 1
        graphs = {name: partial(often, bench.captured(call), times) for name, call in calls.items()}
        bench.time("tower", "captured", batch, graphs, times)
        del graphs
        if batch in LLM_BATCHES:
            bench.time("tower", "eager", batch, calls)


def run_tower(model: nn.Module, pixels: Tensor) -> Tensor:
    """What the projector reads."""
    output = model.model.vision_tower(pixels, output_hidden_states=True)
    return output.hidden_states[model.config.vision_feature_layer]


def merge(bench: Bench) -> None:
    """One merge of 577 tokens, by keys and by hidden states, captured: a graph of many, launched once."""
    width, reducer = bench.model.config.vision_config.hidden_size, METHODS["pitome"].reducer()
    times = MERGES if bench.gpu else 1
    for batch in LLM_BATCHES:
        x = torch.randn(batch, 577, width, device=bench.device, dtype=bench.model.dtype)
        size = torch.ones(batch, 577, 1, device=bench.device)
        metrics = {"keys": lambda x: x.unflatten(-1, (-1, 64)).mean(2), "hidden states": lambda x: x}

        def once(metric: Callable[[Tensor], Tensor], x: Tensor, size: Tensor) -> Tensor:
            return reducer.match(metric(x), 150, size=size, protected=1, depth=0.3).reduce(x, size)[0]

        calls = {what: partial(often, partial(once, metric, x, size), times) for what, metric in metrics.items()}
        graphs = {what: bench.captured(call) for what, call in calls.items()}
        bench.time("merge", "captured", batch, graphs, times)


def prefill(bench: Bench) -> None:
    """Tower, projector and LLM over the prompt, captured as one graph."""
    models = {name: bench.merged(name) for name in ("plain", "default", "5 points")}
    for batch in LLM_BATCHES:
        inputs = prompt(bench.model, batch)
        text = bench.model.get_input_embeddings()(inputs["input_ids"][:, 576:])
        calls = {name: partial(run_prefill, model, inputs["pixel_values"], text) for name, model in models.items()}
        bench.time("prefill", "captured", batch, {name: bench.captured(call) for name, call in calls.items()})


def run_prefill(model: nn.Module, pixels: Tensor, text: Tensor) -> Tensor:
    """The logits behind the prompt."""
    features = run_tower(model, pixels)[:, 1:]
    embeds = torch.cat([model.model.multi_modal_projector(features), text], 1)
    states = model.model.language_model(inputs_embeds=embeds, use_cache=True).last_hidden_state
    return model.lm_head(states[:, -1])


def first_token(bench: Bench) -> None:
    """generate() of one token: all that surrounds the prefill too."""
    models = {name: bench.merged(name) for name in ("plain", "default", *(f"pitome, {keep}" for keep in KEEPS))}
    for batch in LLM_BATCHES:
        inputs = prompt(bench.model, batch)
        calls = {name: partial(run_generate, model, inputs) for name, model in models.items()}
        for mode, graph in MODES.items():
            for handle in filter(None, map(Attachment.of, models.values())):
                handle.update(graph=graph)
            bench.time("first token", mode, batch, calls)


def run_generate(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The first token of an answer."""
    return model.generate(
        **inputs, min_new_tokens=1, max_new_tokens=1, do_sample=False, num_beams=1, pad_token_id=0
    )  # fmt: skip


def bits(bench: Bench) -> None:
    """How many different results 20 runs of a method give, eager and by a graph; one is what is promised."""
    pixels = prompt(bench.model, 2)["pixel_values"]
    for method in METHODS:
        model = share_weights(bench.model)
        with attach(model, method, keep=144, graph=False) as handle:
            made = [run_tower(model, pixels) for _ in range(20 if bench.gpu else 2)]
            handle.update(graph=True)
            made += [run_tower(model, pixels) for _ in made]
        different: list[Tensor] = []
        for each in made:
            if not any(torch.equal(each, other) for other in different):
                different.append(each)
        bench.sheet.add(Row("bits", method, "graph and eager", 2, value=len(different)))


def memory(bench: Bench) -> None:
    """MiB that generate() of one token takes from the device at most, beside the weights; graphs' own memory too."""
    run_generate(bench.merged("plain"), prompt(bench.model, 1))  # libraries take their workspace once, for all
    for batch in LLM_BATCHES:
        inputs = prompt(bench.model, batch)
        for what, mode in (("plain", "eager"), *(("default", mode) for mode in MODES)):
            model = bench.merged(what)
            if handle := Attachment.of(model):
                handle.update(graph=MODES[mode])
            bench.sheet.add(Row("memory", what, mode, batch, value=peak(partial(run_generate, model, inputs), bench)))
            if handle:
                handle.remove()  # its graphs go, before the next is measured


def peak(call: Callable[[], Any], bench: Bench) -> float:
    """MiB that torch takes from the device at most in three calls, beside what it holds before."""
    if not bench.gpu:
        call()
        return 0.0
    gc.collect()  # models before this one hold graphs in circles
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    often(call, 3)
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_reserved() - before) / 2**20, 1)
