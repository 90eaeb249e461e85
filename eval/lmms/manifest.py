"""What lmms-eval finds through its entry point group ``lmms_eval.models``.

It loads this module at every start, whatever the model: nothing heavy may be imported here, and nothing may fail.
"""

from __future__ import annotations

from typing import Any

NAME = "pitome_llava"
ALIAS = "pitome_vlm"  # as it takes other models than LLaVA too
CLASSES = {
    "simple_class_path": "pitome_mllm_eval.lmms.model.PitomeLlava",
    "chat_class_path": "pitome_mllm_eval.lmms.model.PitomeLlavaChat",
}


def manifest() -> Any:
    """The model's names with the classes behind them."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, aliases=(ALIAS,), **CLASSES)
