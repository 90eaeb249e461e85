"""What a captured call depends on beside its inputs: a graph is found by this, and made anew where it differs."""

from __future__ import annotations

import os
from itertools import chain, takewhile
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from ..methods.kernels import is_capturing

_PRECISION = getattr(torch._C, "_get_fp32_precision_getter", None)  # the older getters fail where this API was used
# Flash attention of another kind, where this torch knows how to activate one.
_FLASH = getattr(getattr(nn, "attention", None), "current_flash_attention_impl", lambda: None)
_SETTINGS = [  # as far as this version of torch has them
    getattr(torch._C, f"_get_{name}")
    for name in (
        "flash_sdp_enabled", "mem_efficient_sdp_enabled", "math_sdp_enabled", "cudnn_sdp_enabled", "fa3_sdp_enabled",
        "sdp_priority_order",
        "math_sdp_allow_fp16_bf16_reduction", "cublas_allow_fp16_reduced_precision_reduction",
        "cublas_allow_bf16_reduced_precision_reduction", "cublas_allow_fp16_accumulation", "blas_preferred_backend",
        "deterministic_algorithms", "deterministic_algorithms_warn_only", "cudnn_deterministic", "cudnn_benchmark",
        "cudnn_enabled",
    )
    if hasattr(torch._C, f"_get_{name}")
]  # fmt: skip
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_KNOWN = ("torch.", "transformers.", "pitome_mllm.")  # whose modules and hooks do what their tensors say, in any call


def process_state(kind: str) -> tuple:
    """The settings of torch, for this process, thread or ``with`` block, that decide which kernels run."""
    if _PRECISION:
        precision = _PRECISION("cuda", "matmul"), _PRECISION("cuda", "conv")
    else:
        precision = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    settings = (get() for get in _SETTINGS)
    return (
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        torch.get_default_dtype(),
        torch.get_default_device(),
        os.environ.get("PITOME_KERNELS"),  # the switch of methods.kernels
        precision,
        _FLASH(),
        *(tuple(value) if isinstance(value, list) else value for value in settings),
    )


class Watch:
    """The state of modules, as far as a captured call depends on it: .1 ms for a tower of 24 blocks.

    Weights that change in place are the same weights. Of modules that are neither torch's nor transformers', such as
    adapters, every simple attribute counts. The tower's own hooks run around its graph, its forward hooks if they come
    after ``last``.
    """

    def __init__(self, tower: nn.Module, *others: nn.Module, last: Any) -> None:
        modules = [module for root in (tower, *others) for module in root.modules()]
        kept = [vars(module) for module in modules]
        self._modules, self._kept = modules, kept
        self._parts = [each[name] for name in ("_modules", "_parameters", "_buffers") for each in kept]
        self._hooks = [each[name] for name in ("_forward_pre_hooks", "_forward_hooks") for each in kept[1:]]
        self._around, self._last = tower._forward_hooks, last
        self._held = _values(self._parts)  # alive, so that no other tensor can lie where one of them does
        self._tensors = [each for each in self._held if isinstance(each, Tensor)]
        from torch.utils._python_dispatch import is_traceable_wrapper_subclass  # not in the original llava's torch

        if any(map(is_traceable_wrapper_subclass, self._tensors)):
            raise TypeError("a weight is made of other tensors, as distributed or quantised ones are")
        self._kinds = list(dict.fromkeys(map(type, modules)))
        self._others = [each for module, each in zip(modules, kept) if not type(module).__module__.startswith(_KNOWN)]

    def is_current(self) -> bool:
        """Whether these are still the modules, parameters and buffers that there are."""
        now = _values(self._parts)
        return len(now) == len(self._held) and all(map(is_, now, self._held))

    def state(self) -> tuple:
        """Equal for two calls that a graph cannot tell apart."""
        return (
            *map(Tensor.data_ptr, self._tensors),
            *map(Tensor.dtype.__get__, self._tensors),
            *map(type, self._modules),
            *(kind.forward for kind in self._kinds),  # somebody may put another one on a class
            *map(len, self._kept),  # more with a forward, or a hook of accelerate, of an instance's own
            *map(attrgetter("training"), self._modules),
            *map(id, _values(self._hooks)),
            *map(id, takewhile(lambda hook: hook is not self._last, self._around.values())),
            *map(_simple, self._others),
        )


def _values(tables: list[dict]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, tables)))


def _simple(value: Any) -> Any:
    """What of ``value`` can be compared: numbers and words, and these in lists, sets and dictionaries."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, dict):
        return tuple((str(name), _simple(each)) for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_simple, value))
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(map(str, value)))
    return id(value)


def guard_of(value: Any) -> Any:
    """What of an argument a graph depends on; TypeError if it is nothing that can be compared."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, _PLAIN):
        return type(value), value  # 1 and True are equal
    if isinstance(value, (list, tuple)) and not any(isinstance(each, Tensor) for each in value):
        return tuple(map(guard_of, value))
    raise TypeError(f"an argument is a {type(value).__name__}")


def unsupported_now() -> str | None:
    """Why no graph can stand in for a call made here and now; "" where that is to be expected and not worth saying."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_capturing():
        return ""
    if torch.is_grad_enabled():
        return "gradients are recorded (torch.no_grad() or torch.inference_mode() switches that off)"
    modes = [mode for mode in torch.overrides._get_current_function_mode_stack() if not isinstance(mode, DeviceContext)]
    if modes or torch._C._len_torch_dispatch_stack():
        return "a mode watches operations, such as a counter of FLOPs"
    if nn.modules.module._has_any_global_hook():
        return "there are hooks for all modules"
    return None


def unsupported_modules(tower: nn.Module, *others: nn.Module, last: Any) -> str | None:
    """Why a tower and other modules that its graph runs cannot be captured, as they are.

    The tower's own hooks run around the graph, those after ``last`` (a hook of ours) with what it made.
    """
    for root in (tower, *others):
        for name, module in root.named_modules():
            where = f"on {name!r}" if name else f"on the {type(module).__name__} itself"
            if module.training:
                return "it is in training mode; model.eval() ends that"
            if hasattr(module, "_orig_mod") or vars(module).get("_compiled_call_impl") is not None:
                return f"it is compiled already ({where})"
            if hasattr(module, "_hf_hook"):
                return f"accelerate moves weights or inputs ({where})"
            if "forward" in vars(module) and module is not tower:
                return f"a forward was replaced ({where})"
            if any(not _is_known(hook) for hook in _hooks_inside(module, tower, last)):
                return f"there is a forward hook {where}, which no graph calls"
    if len({tensor.device for root in (tower, *others) for tensor in (*root.parameters(), *root.buffers())}) > 1:
        return "its weights lie on several devices"
    return None


def foreign_module(root: nn.Module) -> str | None:
    """A module within, of whose class it is not known what it does; said as a reason."""
    foreign = (name for name, module in root.named_modules() if not type(module).__module__.startswith(_KNOWN))
    return next((f"{name!r} is neither torch's nor transformers'" for name in foreign), None)


def _hooks_inside(module: nn.Module, tower: nn.Module, last: Any) -> list[Any]:
    """The forward hooks of a module that would be inside a graph."""
    after = module._forward_hooks.values()
    if module is tower:
        return list(takewhile(lambda hook: hook is not last, after))
    return [*module._forward_pre_hooks.values(), *after]


def _is_known(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or type(hook).__module__ or "").startswith(_KNOWN)
