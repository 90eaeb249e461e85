"""The LLM's prefill as a CUDA graph: its call over a whole prompt, which fills an empty KV cache.

What the LLM is told, positions and the mask of a calibration, are inputs of the graph. A call gets copies of the keys
and values, in the cache that it brought.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..plan import Plan
from .caches import NAMES, cache_in, name_for
from .guards import foreign_module, guard_of
from .work import Work


class PrefillWork(Work):
    """A call of the LLM with a prompt's embeddings and an empty dynamic KV cache."""

    name, apart = "the LLM's prefill", NAMES

    def __init__(self, module: nn.Module, plan: Plan, plain: Callable[..., Any], args: tuple, kwargs: dict) -> None:
        super().__init__(module, plan, plain, args, kwargs)
        self.past = cache_in(kwargs)
        self.is_empty = _is_new(self.past)  # asked before the call fills it

    @property
    def settings(self) -> tuple:
        config = self.module.config
        return type(self.past), config._attn_implementation, guard_of(config.use_cache)

    @property
    def last(self) -> Any:
        """The first of the hooks: all of them run around the graph."""
        return next(iter(self.module._forward_hooks.values()), None)

    def eager_reason(self) -> str | None:
        if self.kwargs.get("output_hidden_states") or self.module.config.output_hidden_states:
            return "hidden states were asked for"
        if not self.is_empty:
            return "its KV cache is none that generate() makes and nothing is in"
        mask = self.kwargs.get("attention_mask")
        if mask is None and name_for(self.module) == NAMES[0]:
            return "some transformers before 5.24 make an attention mask within a graph that they make nowhere else"
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4):
            return "what its attention mask becomes depends on padding"
        return super().eager_reason()

    def eager_reason_inside(self) -> str | None:
        return foreign_module(self.module) or super().eager_reason_inside()

    def again(self, *tensors: Tensor) -> tuple[Any, str, list[dict]]:
        args, kwargs = self.placed(tensors)
        past = type(self.past)(config=self.module.config)
        output = self.plain(*args, **{name: past if value is self.past else value for name, value in kwargs.items()})
        name = next(name for name, value in output.items() if value is past)
        states = type(output)(**{key: value for key, value in output.items() if key != name})
        return states, name, [vars(layer) for layer in past.layers]

    def hand_out(self, made: tuple[Any, str, list[dict]]) -> Any:
        output, name, layers = made
        for layer, filled in zip(self.past.layers, layers):
            vars(layer).update(filled)
        output[name] = self.past
        return output


def _is_new(past: Any) -> bool:
    """Whether a KV cache is what the LLM would make itself, of layers that keep everything, and with nothing in it."""
    layers = getattr(past, "layers", None)
    if type(past).__name__ != "DynamicCache" or not layers or type(layers[0]).__name__ != "DynamicLayer":
        return False
    empty, apart = vars(type(layers[0])()), {"layers": None, "layer_class_to_replicate": None}
    alike = all(type(layer) is type(layers[0]) and vars(layer) == empty for layer in layers)
    return alike and {**vars(past), **apart} == {**vars(type(past)()), **apart}


def run_prefill(language: nn.Module, plain: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """A call of the LLM, by a graph where it is a prefill and ``graph=True``; "auto" is what was tried on a GPU."""
    embeds, plan = kwargs.get("inputs_embeds"), language._pitome.plan
    if embeds is None or embeds.shape[1] == 1 or plan is None or plan.graph is not True or cache_in(kwargs) is None:
        return plain(*args, **kwargs)
    return language._pitome.prefills.run(PrefillWork, embeds.device, language, plan, plain, args, kwargs)
