"""What kernels are launched with, by Triton's own launcher in C: what a GPU's driver would get is noted instead."""

from __future__ import annotations

import subprocess

from outside import run_outside

DRIVER = """
#include <string.h>
unsigned long long noted[64];
static char kinds[64];
void expect(const char *given) { strcpy(kinds, given); }
int cuLaunchKernelEx(const unsigned *config, void *function, void **values, void **extra) {
    int n = 0;
    memset(noted, 0, sizeof noted);
    for (; n < 7; n++) noted[n] = config[n];  /* grid, block, shared memory */
    noted[n++] = *(unsigned long long *)(config + 8);  /* stream */
    noted[n++] = (unsigned long long)function;
    for (int k = 0; kinds[k]; k++, n++)
        noted[n] = kinds[k] == 'l' ? *(unsigned long long *)values[k] : *(unsigned *)values[k];
    return 0;
}
static long handles = 1;
int cuModuleLoadData(long *made, void *image) { *made = ++handles; return 0; }
int cuModuleGetFunction(long *made, void *module, char *name) { *made = ++handles; return 0; }
int cuFuncGetAttribute(int *value, int which, void *function) { *value = which ? 0 : 1024; return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) { *value = 227 << 10; return 0; }
int cuPointerGetAttribute(void **at, int which, void *pointer) { *at = pointer; return 0; }
int cuCtxGetCurrent(long *context) { *context = 1; return 0; }
int unloaded = 0;
int cuModuleUnload(void *module) { return ++unloaded, 0; }
"""
NOTHING = """
    cuCtxGetDevice cuCtxGetLimit cuCtxSetCurrent cuCtxSetLimit cuDeviceGet cuDevicePrimaryCtxRetain cuDriverGetVersion
    cuFuncSetAttribute cuFuncSetCacheConfig cuGetErrorString cuStreamIsCapturing
"""
LAUNCHING = """
import ctypes
import gc
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
from pitome_mllm.methods import kernels, triton_kernels

driver = ctypes.CDLL("libcuda.so.1")
noted = (ctypes.c_ulonglong * 64).in_dll(driver, "noted")


class Device(CudaDriver):
    def __init__(self):
        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
        self.get_current_device, self.get_current_stream = lambda: 0, lambda device: 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


triton.runtime.driver.set_active(Device())
compiled = []
short = triton_kernels.launcher
triton_kernels.launcher = lambda kernel, grid: compiled.append(kernel) or short(kernel, grid)
tritons = []
own = CudaLauncher.__call__
CudaLauncher.__call__ = lambda *args: tritons.append(args) or own(*args)


def compare(launch, *tensors):
    driver.expect(b"")
    launch(7, *tensors)  # compiles
    kinds = [kind for kind in compiled[-1].src.signature.values() if kind != "constexpr"]
    driver.expect("".join("l" if kind[0] == "*" or kind == "i64" else "i" for kind in kinds).encode())
    tritons.clear()
    launch(7, *tensors)
    assert not tritons, "Triton's launcher in Python was asked again: its version is not known"
    again, launch._run, noted[:] = list(noted), None, [0] * 64
    launch(7, *tensors)
    assert list(noted) == again and again[7] == 7, (launch._kernel, list(noted), again)
    assert again[:3] == list(launch._grid)
    assert compiled[-1].metadata.enable_fp_fusion == (launch._kernel != "combine")  # it decides near-ties
    return launch._kernel


seen = set()
for dtype, shape, size in ((torch.bfloat16, (1, 257, 64), None), (torch.float32, (2, 18, 80), torch.ones(2, 18, 1))):
    batch, tokens = shape[:2]
    metric, x = torch.randn(shape).to(dtype), torch.randn(batch, tokens, 48).to(dtype)
    for energy in (None, kernels.Energy(9, -0.2, 0.5, True)):
        launches, total, _ = kernels._decision(kernels.Rows.of(metric), 1, 1, energy)
        memory = torch.empty(total, dtype=torch.uint8)
        seen |= {compare(launch, memory, *((metric,) if reads else ())) for reads, launch in launches}
    what = batch, tokens, tokens - 1, 1
    launch = kernels._combination(kernels.Rows.of(x), what, size is not None, True, True, False)
    made = torch.empty(batch, tokens - 1, 48, dtype=dtype), torch.empty(batch, tokens - 1, 1), torch.empty_like(x)
    seen.add(compare(launch, memory, x, made[1] if size is None else size, *made))
assert seen == {"prepare", "add_energies", "rank", "match", "place", "combine"}, seen
CudaLauncher.__call__ = lambda *args: tritons.append(args)
compiled[-1].run.gsan_enabled = True
tritons.clear()
short(compiled[-1], (1, 1, 1))(7)
assert tritons, "what takes more than is known goes by Triton's own launcher"
compiled.clear()
for name in seen:
    getattr(triton_kernels, name).device_caches.clear()  # as where two threads compile at once, and one is forgotten
gc.collect()
assert not ctypes.c_int.in_dll(driver, "unloaded").value, "what a later launch runs was unloaded"
"""


def test_later_launches_give_a_gpu_what_tritons_own_way_does(tmp_path):
    nothing = "".join(f"int {name}(void) {{ return 0; }}\n" for name in NOTHING.split())
    (tmp_path / "driver.c").write_text(DRIVER + nothing)
    building = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1", "driver.c"]
    subprocess.run(building, cwd=tmp_path, check=True, timeout=60)
    cache, here = str(tmp_path / "cache"), str(tmp_path)
    run_outside(LAUNCHING, TRITON_CACHE_DIR=cache, TRITON_DEFAULT_FP_FUSION="0", LD_LIBRARY_PATH=here,
                TRITON_LIBCUDA_PATH=here)  # fmt: skip
