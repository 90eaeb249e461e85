"""Fewer visual tokens for multimodal LLMs, without retraining: `attach` merges redundant ones inside the vision tower.

Read `attach` first.
"""

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
