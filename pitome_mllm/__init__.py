"""Fewer visual tokens for multimodal LLMs, without retraining: `attach` merges redundant ones inside the vision tower.

Read `attach` first. What stands here is imported when it is first asked for: neither `import pitome_mllm` nor the
command line's help waits for torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attach import Attachment, attach
    from .costs.flops import estimate
    from .loading import load
    from .methods import METHODS, get_method
    from .schedule import Schedule
    from .spectral import spectral_distance
    from .visualize import draw_groups

__version__ = "0.2.0"

__all__ = [
    "METHODS",
    "Attachment",
    "Schedule",
    "__version__",
    "attach",
    "draw_groups",
    "estimate",
    "get_method",
    "load",
    "spectral_distance",
]

_HOMES = {
    "METHODS": "methods",
    "Attachment": "attach",
    "Schedule": "schedule",
    "attach": "attach",
    "draw_groups": "visualize",
    "estimate": "costs.flops",
    "get_method": "methods",
    "load": "loading",
    "spectral_distance": "spectral",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(sys.modules[__name__]).setdefault(name, getattr(import_module(f".{_HOMES[name]}", __name__), name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Root(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "attach" and isinstance(value, ModuleType):  # the import of a submodule must not hide its function
            value = value.attach
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Root
