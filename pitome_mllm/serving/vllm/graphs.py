"""Tower, merging and projector of LLaVA-1.5 as one CUDA graph of vLLM's, of which ``cudagraph_mm_encoder`` makes some.

Images that keep as many tokens as is configured replay a graph; others are encoded without, one by one. Not run on a
GPU so far: the tests put a stand-in for CUDA's graphs into vLLM's own manager of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.utils import scatter_output_slices
from vllm.v1.worker.encoder_cudagraph_defs import (
    EncoderCudaGraphCaptureInputs,
    EncoderCudaGraphConfig,
    EncoderCudaGraphReplayBuffers,
    EncoderItemSpec,
)

from ...errors import UserError
from .processing import KEEP

PIXELS = "pixel_values"
TOO_MANY = 2**40  # tokens that fit into no graph, so that vLLM encodes the image without


class EncoderGraphs:
    """What vLLM calls SupportsEncoderCudaGraph, for a model with ``plan``, ``at_once`` and ``encode_alike``."""

    supports_encoder_cudagraph = True

    def get_input_modality(self, mm_kwargs: dict[str, Any]) -> str:
        return "image"

    def get_max_frames_per_video(self) -> int:
        return 0

    def get_encoder_cudagraph_config(self) -> EncoderCudaGraphConfig:
        if self.multimodal_config.enable_mm_embeds:
            raise UserError("cudagraph_mm_encoder and --enable-mm-embeds are not possible together; leave one out")
        return EncoderCudaGraphConfig(["image"], [PIXELS], self.config.text_config.hidden_size)

    def get_encoder_cudagraph_budget_range(self, vllm_config: Any) -> tuple[int, int]:
        return self.plan.keep, self.plan.keep * self.at_once

    def get_encoder_cudagraph_item_specs(self, mm_kwargs: dict[str, Any]) -> list[EncoderItemSpec]:
        patches, own = self.plan.available, self.plan.keep
        return [EncoderItemSpec(patches, own if keep == own else TOO_MANY) for keep in mm_kwargs[KEEP].tolist()]

    def select_encoder_cudagraph_items(self, mm_kwargs: dict[str, Any], indices: list[int]) -> dict[str, Any]:
        return {name: mm_kwargs[name][indices] for name in (PIXELS, KEEP)}

    def prepare_encoder_cudagraph_capture_inputs(
        self,
        token_budget: int,
        max_batch_size: int,
        max_frames_per_batch: int,
        device: torch.device,
        dtype: torch.dtype,
        path: str = "default",
        axis_keys: Any = None,
    ) -> EncoderCudaGraphCaptureInputs:
        images, side = min(max(token_budget // self.plan.keep, 1), max_batch_size), self.config.vision_config.image_size
        return EncoderCudaGraphCaptureInputs({PIXELS: torch.randn(images, 3, side, side, device=device, dtype=dtype)})

    def prepare_encoder_cudagraph_replay_buffers(
        self, mm_kwargs: dict[str, Any], max_batch_size: int, max_frames_per_batch: int, path: str = "default"
    ) -> EncoderCudaGraphReplayBuffers:
        return EncoderCudaGraphReplayBuffers({PIXELS: mm_kwargs[PIXELS]})

    def encoder_cudagraph_forward(self, inputs: dict[str, Tensor], path: str = "default") -> Tensor:
        return self.encode_alike(inputs[PIXELS], self.plan).flatten(0, 1)

    def encoder_eager_forward(self, mm_kwargs: dict[str, Any], path: str = "default") -> Tensor:
        return torch.cat(self.embed_multimodal(**mm_kwargs))

    def postprocess_encoder_output(
        self,
        outputs: dict[str, Tensor],
        indices: list[int],
        per_item_out_tokens: list[int],
        dest: Any,
        clone: bool = False,
        batch_mm_kwargs: dict[str, Any] | None = None,
    ) -> None:
        keeps = dict(zip(indices, batch_mm_kwargs[KEEP].tolist()))
        real = [keeps.get(item, tokens) for item, tokens in enumerate(per_item_out_tokens)]
        scatter_output_slices(outputs["default"], indices, real, dest, clone)
