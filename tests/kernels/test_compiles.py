"""The kernels compile for GPUs, which takes none: the interpreter looks at no types."""

from __future__ import annotations

import pytest
from outside import run_outside

COMPILING = """
import sys
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pitome_mllm.methods import launches, triton_kernels

kinds = dict(margin="fp32", alpha="fp32", scale="fp32", energy="*i64", group="*i64", lead="*i64")
kinds |= dict(leads_then_rest="*i64", least="*i32", order="*i32", best="*i32", member="*i32", slot="*i32")
kinds |= dict(inverse="*fp32", top="*fp32", size="*fp32", total="*fp32")


def build(kernel, capability, dtype, **constants):
    kinds.update(metric=dtype, x=dtype, y=dtype, logs=dtype)
    names = getattr(triton_kernels, kernel).arg_names
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}
    whole = [name.endswith("stride") or "*" in signature[name] for name in names]
    aligned = {(k,): [["tt.divisibility", 16]] for k, name in enumerate(names) if whole[k]}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(getattr(triton_kernels, kernel), signature, values, aligned)
    triton.compile(source, target=GPUTarget("cuda", capability, 32))


capability, dtype = int(sys.argv[1]), sys.argv[2]
precision = "tf32x3" if dtype == "*fp32" else "ieee"
dtypes = {"*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32}
for width in (1152, 72):
    tiles = launches.Tiles.of(dtypes[dtype], width)
    energies, matches = ({"WIDTH": width, "STEP": tile.step, "PRECISION": precision} for tile in tiles)
    build("add_energies", capability, dtype, **energies, SIDE=tiles.energies.rows, ELU=True)
    build("match", capability, dtype, **matches, ROWS=tiles.matches.rows, COLUMNS=tiles.matches.columns, ORDERED=True)
build("prepare", capability, dtype, WIDTH=1152, STEP=1024, ROWS=4)
build("rank", capability, dtype, ROWS=4, ALL=1024)
build("place", capability, dtype, ALL=1024, HALF=512, CHUNK=32, ORDERED=False, SELECT=True)
build("combine", capability, dtype, WIDTH=1152, STEP=1024, REST=512, SIZED=True, WEIGHTED=False)
"""


@pytest.mark.parametrize("capability, dtype", [(80, "*bf16"), (90, "*fp16"), (90, "*fp32")])
def test_kernels_compile(capability, dtype):
    run_outside(COMPILING, str(capability), dtype)
