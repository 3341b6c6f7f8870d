"""The shim catches what it is there for: each fault is planted in a kernel of a few lines, beside the right version."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shim import KernelFault, ShimBackend, needs_shim

from headrace.kernels.launch import Argument, KernelSpec, backend, empty, launch

pytestmark = needs_shim
SEEDS = range(12)


class Kernel:
    """A kernel `k` of the given parameters and body, in a file of its own."""

    def __init__(self, folder: Path, parameters: str, body: str) -> None:
        path = folder / "k.cu"
        path.write_text(f'#include "common.cuh"\nextern "C" __global__ void k({parameters}) {{\n{body}\n}}\n')
        self.spec = KernelSpec(source=str(path), name="k")

    def __call__(
        self, *args: Argument, grid: int = 1, block: int = 64, seed: int = 0, shared: int = 0, races: bool = False
    ) -> None:
        like = next(arg for arg in args if isinstance(arg, torch.Tensor))
        with backend(ShimBackend(seed, races=races, limit_s=2.0)):
            launch(self.spec, grid, block, args, device_of=like, shared_bytes=shared)


REVERSE = """
  __shared__ int s[64];
  s[threadIdx.x] = x[threadIdx.x];
  BARRIER;
  y[threadIdx.x] = s[63 - threadIdx.x];
"""


def reverse(folder: Path, barrier: str) -> Kernel:
    return Kernel(folder, "const int* x, int* y", REVERSE.replace("BARRIER", barrier))


def test_a_right_kernel_gives_the_same_on_every_schedule(tmp_path):
    kernel = reverse(tmp_path, "__syncthreads()")
    x, y = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    for seed in SEEDS:
        y.zero_()
        kernel(x, y, seed=seed)
        assert y.tolist() == list(range(63, -1, -1))


def test_missing_barrier_shows_poison(tmp_path):
    kernel = reverse(tmp_path, "__syncwarp()")
    x, y = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    wrong = 0
    for seed in range(1, 13):
        kernel(x, y, seed=seed)
        wrong += y.tolist() != list(range(63, -1, -1))
        assert set(y.tolist()) <= {*range(64), -0x34343435}
    assert wrong >= 6


def test_divergent_barrier_is_reported_with_its_threads(tmp_path):
    kernel = Kernel(tmp_path, "int* y", "if (threadIdx.x < 40) __syncthreads();\ny[threadIdx.x] = 1;")
    for seed in SEEDS:
        with pytest.raises(KernelFault, match="barrier") as fault:
            kernel(torch.zeros(64, dtype=torch.int32), seed=seed)
        assert "thread" in str(fault.value)


def test_two_barriers_of_one_block_are_told_apart(tmp_path):
    kernel = Kernel(tmp_path, "int* y", "if (threadIdx.x < 32) __syncthreads();\nelse __syncthreads();\ny[0] = 1;")
    for seed in SEEDS:
        with pytest.raises(KernelFault, match=r"waits at another barrier, k\.cu:[34]"):
            kernel(torch.zeros(64, dtype=torch.int32), seed=seed)


def test_uninitialised_shared_memory_is_poison(tmp_path):
    kernel = Kernel(
        tmp_path,
        "int* y, int* z",
        "__shared__ int s[64]; DYN_SMEM(int, d);\ny[threadIdx.x] = s[threadIdx.x]; z[threadIdx.x] = d[threadIdx.x];\n"
        "s[threadIdx.x] = d[threadIdx.x] = 7;",
    )
    y, z = torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    for _ in range(2):  # nothing is left from the launch before
        kernel(y, z, shared=256)
        assert set(y.tolist()) == set(z.tolist()) == {-0x34343435}


def test_shared_memory_is_poisoned_for_each_block(tmp_path):
    body = "__shared__ int s;\nif (blockIdx.x == 0) s = 1;\n__syncthreads();\nif (threadIdx.x == 0) y[blockIdx.x] = s;"
    y = torch.zeros(3, dtype=torch.int32)
    Kernel(tmp_path, "int* y", body)(y, grid=3)
    assert y.tolist() == [1, -0x34343435, -0x34343435]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if (threadIdx.x < 16) y[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0);", "names it|has left"),
        ("y[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 0);", "leaves out the caller"),
        ("y[threadIdx.x] = __shfl_sync(threadIdx.x < 16 ? 0xffffu : 0xffff0000u, 1, 0);", "reads lane 0"),
        ("unsigned m = threadIdx.x % 2 ? 0xffffffffu : 0x55555555u; y[0] = __ballot_sync(m, 1);", "0x55555555"),
        ("y[0] = threadIdx.x % 2 ? __ballot_sync(~0u, 1) : __match_any_sync(~0u, 1);", "waits in"),
    ],
)
def test_wrong_masks_are_reported(tmp_path, body, message):
    kernel = Kernel(tmp_path, "unsigned* y", body)
    for seed in SEEDS:
        with pytest.raises(KernelFault, match=message):
            kernel(torch.zeros(64, dtype=torch.int32), block=32, seed=seed)


def test_a_warp_that_waits_for_a_lane_at_a_barrier_is_a_deadlock(tmp_path):
    kernel = Kernel(
        tmp_path, "int* y", "if (threadIdx.x == 3) __syncthreads();\n__syncwarp();\ny[0] = 1;\n__syncthreads();"
    )
    with pytest.raises(KernelFault, match="deadlock") as fault:
        kernel(torch.zeros(64, dtype=torch.int32), block=32)
    assert "threads 0-2, 4-31 wait in __syncwarp of mask 0xffffffff (k.cu:4)" in str(fault.value)
    assert "threads 3 wait at __syncthreads (k.cu:3)" in str(fault.value)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("index", ["n", "n + 3", "-1", "-5"])
@pytest.mark.parametrize("write", [False, True])
def test_out_of_bounds_names_the_argument(tmp_path, seed, index, write):
    body = f"if (threadIdx.x == 5) {{ long long i = {index}; {'x[i] = 1' if write else 'y[0] = x[i]'}; }}"
    kernel = Kernel(tmp_path, "int* y, int* x, long long n", body)
    x = torch.ones(64, dtype=torch.int32)
    try:
        kernel(torch.zeros(1, dtype=torch.int32), x, 64, seed=seed)
    except KernelFault as fault:
        assert "argument 1" in str(fault)
    else:  # a read inside the page on the open side of this schedule; the others put the guard there
        assert not write and (seed % 3 == 2) == (index[0] == "n")


def test_out_of_bounds_of_shared_and_local_arrays(tmp_path):
    for body in (
        "__shared__ int s[8];\ns[threadIdx.x] = 1;\ny[0] = s[0];",
        "int s[8];\ns[threadIdx.x] = 1;\ny[0] = s[0];",
    ):
        with pytest.raises(KernelFault, match=r"thread \(8,0,0\) .* at k.cu:4: index 8 is outside its array"):
            Kernel(tmp_path, "int* y", body)(torch.zeros(1, dtype=torch.int32))
    kernel = Kernel(tmp_path, "int* y", "DYN_SMEM(int, d); d[threadIdx.x] = 1; y[0] = d[0];")
    with pytest.raises(KernelFault, match=r"0 bytes past its 128 bytes of dynamic shared memory"):
        kernel(torch.zeros(1, dtype=torch.int32), shared=128)


def test_int_overflow_of_an_offset(tmp_path):
    kernel = Kernel(
        tmp_path, "long long rows, long long width, long long* y", "int r = rows, w = width;\ny[0] = r * w;"
    )
    y = torch.zeros(1, dtype=torch.int64)
    kernel(2**16 - 1, 2**15, y)
    assert y.item() == (2**16 - 1) * 2**15
    with pytest.raises(KernelFault, match=r"k.cu:4: a signed integer overflows \(mul\)"):
        kernel(2**16, 2**15, y)
    right = Kernel(tmp_path, "long long rows, long long width, long long* y", "y[0] = rows * width;")
    right(2**16, 2**15, y)
    assert y.item() == 2**31


def test_order_of_atomics_shows(tmp_path):
    kernel = Kernel(tmp_path, "int* n, int* y", "y[atomicAdd(n, 1)] = blockIdx.x * 64 + threadIdx.x;")
    seen = set()
    for seed in SEEDS:
        n, y = torch.zeros(1, dtype=torch.int32), torch.zeros(192, dtype=torch.int32)
        kernel(n, y, grid=3, seed=seed)
        assert sorted(y.tolist()) == list(range(192)) and n.item() == 192
        seen.add(tuple(y.tolist()))
    assert len(seen) >= 10


def test_a_read_before_an_atomic_is_interrupted(tmp_path):
    kernel = Kernel(tmp_path, "int* n", "int old = *n; atomicExch(n, old + 1);")
    counts = set()
    for seed in SEEDS:
        n = torch.zeros(1, dtype=torch.int32)
        kernel(n, seed=seed)
        counts.add(n.item())
    assert min(counts) < 64


def test_waiting_for_another_block_ends(tmp_path):
    kernel = Kernel(tmp_path, "volatile int* flag", "if (blockIdx.x == 0) while (!*flag) {}\nelse *flag = 1;")
    with pytest.raises(KernelFault, match=r"thread \(0,0,0\) of block \(0,0,0\) did not end in time"):
        kernel(torch.zeros(1, dtype=torch.int32), grid=2)


def test_a_full_stack_is_reported(tmp_path):
    kernel = Kernel(
        tmp_path, "int* y", "volatile char big[100000];\nfor (int i = 99999; i >= 0; --i) big[i] = i;\ny[0] = big[5];"
    )
    with pytest.raises(KernelFault, match="bytes of stack"):
        kernel(torch.zeros(1, dtype=torch.int32))


def test_a_launch_that_does_not_fit_the_kernel_is_refused(tmp_path):
    kernel = Kernel(tmp_path, "const float* x, long long n, float s", "")
    x = torch.zeros(4)
    kernel(x, 4, 1.0)
    for args in ((x, 4), (x.double(), 4, 1.0), (x, 4.0, 1.0), (4, x, 1.0)):
        with pytest.raises(KernelFault, match=r"k takes \(p4, long long, float\), the launch gives"):
            kernel(*args)
    with pytest.raises(KernelFault, match="whole warps"):
        kernel(x, 4, 1.0, block=48)
    with pytest.raises(KernelFault, match="at most 1024"):
        kernel(x, 4, 1.0, block=2048)


def test_outputs_are_poisoned_and_an_empty_grid_is_no_launch(tmp_path):
    shim = ShimBackend()
    with backend(shim):
        tensor = empty((4,), torch.int32, torch.zeros(0))
        launch(KernelSpec(source="none.cu", name="none"), 0, 32, (), device_of=tensor)
    assert tensor.tolist() == [-0x34343435] * 4 and shim.launches == []


def test_what_ran_before_a_fault_does_not_show_after_it(tmp_path):
    kernel = reverse(tmp_path, "__syncthreads()")
    x, y = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    for _ in range(3):
        with pytest.raises(KernelFault):
            kernel(x, y[:32])
        kernel(x, y)
        assert y.tolist() == list(range(63, -1, -1))


def test_overlapping_arguments_stay_one_memory(tmp_path):
    kernel = Kernel(tmp_path, "int* x, int* y", "if (threadIdx.x < 8) x[threadIdx.x] = y[threadIdx.x] + 1;")
    memory = torch.arange(16, dtype=torch.int32)
    kernel(memory[:8], memory[4:12], block=32)
    assert memory.tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 8, 9, 10, 11, 12, 13, 14, 15]


def test_warp_operations_mean_what_cuda_says(tmp_path):
    body = """
      const int lane = threadIdx.x;
      int* row = y + lane * 10;
      int all = 0;
      row[0] = __shfl_up_sync(~0u, lane, 3);
      row[1] = __shfl_down_sync(~0u, lane, 3, 8);
      row[2] = __shfl_xor_sync(~0u, lane, 5);
      row[3] = __shfl_sync(~0u, lane, 2, 16);
      row[4] = __ballot_sync(~0u, lane % 3 == 0);
      row[5] = __match_any_sync(~0u, lane % 4);
      row[6] = __reduce_add_sync(~0u, lane);
      row[7] = __match_all_sync(~0u, 5, &all);
      row[8] = all + __any_sync(~0u, lane == 31) + __all_sync(~0u, lane < 31);
      row[9] = __syncthreads_count(lane < 7);
    """
    y = torch.zeros(32, 10, dtype=torch.int32)
    for seed in SEEDS:
        Kernel(tmp_path, "int* y", body)(y, block=32, seed=seed)
        thirds = sum(1 << lane for lane in range(0, 32, 3))
        for lane, row in enumerate(y.tolist()):
            same = sum(1 << other for other in range(32) if other % 4 == lane % 4)
            wanted = [
                lane - 3 if lane >= 3 else lane,
                lane + 3 if lane % 8 < 5 else lane,
                lane ^ 5,
                lane // 16 * 16 + 2,
            ]
            wanted += [thirds, same, 496, -1, 2, 7]
            assert [value % 2**32 for value in row] == [value % 2**32 for value in wanted]


RACES = {
    "missing barrier": (REVERSE.replace("BARRIER", ";"), "nobody has written|written by|read by"),
    "warp barrier instead of a block's": (
        REVERSE.replace("BARRIER", "__syncwarp()"),
        "nobody has written|written by|read by",
    ),
    "update without an atomic": (
        "__shared__ int n; if (!threadIdx.x) n = 0; __syncthreads(); n += 1; y[0] = x[0];",
        "thread",
    ),
    "one cell for all threads": ("y[0] = x[threadIdx.x];", r"race: writes byte 0 of argument 1, written by thread \d+"),
    "one cell for all blocks": (
        "if (!threadIdx.x) y[0] = blockIdx.x;",
        "another block's thread 0 with nothing in between",
    ),
    "atomic beside a plain read": ("if (threadIdx.x) atomicAdd(y, x[0]); else y[1] = y[0];", "thread"),
    "read while another writes": (
        "if (threadIdx.x == 40) y[0] = 1; else if (threadIdx.x == 3) y[1] = y[0];",
        "of argument 1",
    ),
    "one byte too far": (
        "if (!threadIdx.x) y[1] = *(const int*)((const char*)(x + 63) + 1);",
        "offset 253 of argument 0",
    ),
    "lanes that the mask leaves out": (
        "__shared__ int s[64]; s[threadIdx.x] = 1; if (threadIdx.x % 32 < 16) __syncwarp(0xffff);\n"
        "if (threadIdx.x == 0) y[0] = s[20];",
        "nobody has written|written by",
    ),
}


@pytest.mark.parametrize("fault", RACES)
def test_races_are_seen_on_every_schedule(fault, tmp_path):
    body, message = RACES[fault]
    kernel = Kernel(tmp_path, "const int* x, int* y", body)
    x, y = torch.ones(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    for seed in SEEDS:
        with pytest.raises(KernelFault, match=message):
            kernel(x, y, grid=2, seed=seed, races=True)


def test_ordered_threads_do_not_race(tmp_path):
    body = """
      __shared__ int s[64], n;
      if (threadIdx.x == 0) n = 0;
      s[threadIdx.x] = x[threadIdx.x];
      __syncthreads();
      atomicAdd(&n, s[63 - threadIdx.x]);
      __syncthreads();
      const int sum = n;
      s[threadIdx.x] = sum;                       // after a barrier: the others have read it
      __syncwarp();
      const int next = s[threadIdx.x ^ 1];
      __syncwarp();
      s[threadIdx.x] = next + __shfl_xor_sync(0xffffffffu, sum, 1);
      atomicAdd(y + 1, 1);
      if (threadIdx.x == 0 && blockIdx.x == 0) y[0] = s[0];
    """
    kernel = Kernel(tmp_path, "const int* x, int* y", body)
    for seed in SEEDS:
        y = torch.zeros(2, dtype=torch.int32)
        kernel(torch.ones(64, dtype=torch.int32), y, grid=3, seed=seed, races=True)
        assert y.tolist() == [128, 192]
