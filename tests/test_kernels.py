"""The CUDA kernels of the fused sum, on the CPU by cuda_emulation.h; mistakes planted in them must show."""
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
KERNELS = TESTS.parent / "csrc" / "mixed_sum_kernels.cuh"
TYPES = {"float32": "float", "float64": "double", "bfloat16": "__nv_bfloat16", "float16": "__half"}
FLAGS = ["-std=c++17", "-O1", "-w", "-fsanitize=alignment,bounds,signed-integer-overflow",
         "-fsanitize-undefined-trap-on-error"]

# name: (operator whose grid must fail, dtype, text, replacement)
MUTATIONS = {
    "dot: no barrier before the warps are added": ("dot", "float32", "  __syncthreads();\n  for (int m",
                                                   "  for (int m"),
    "dot: no barrier in the second stage": ("dot", "float32", "  __syncthreads();\n  if (threadIdx.x > 0)",
                                            "  if (threadIdx.x > 0)"),
    "dot: a barrier in a branch": ("dot", "float32", "  __syncthreads();\n  if (threadIdx.x > 0) return;",
                                   "  if (threadIdx.x > 0) return;\n  __syncthreads();"),
    "dot: a shuffle in a branch": ("dot", "float32", "      dot = warp_sum(dot);",
                                   "      if (i[0] < end) dot = warp_sum(dot);"),
    "dot: half of the warp left out": ("dot", "float32", "distance = kWarp / 2", "distance = kWarp / 4"),
    "dot: last partial left out": ("dot", "float32", "b < a.blocks;", "b < a.blocks - 1;"),
    "dot: tail left out": ("dot", "float32", "  if (packed < a.n &&", "  if (false &&"),
    "dot: tail in every block": ("dot", "float32", "packed < a.n && blockIdx.x == gridDim.x - 1",
                                 "packed < a.n"),
    "dot: reads behind the end": ("dot", "float32", "if (m + k < a.count && i[v] < end)",
                                  "if (m + k < a.count)"),
    "dot: sums not cleared": ("dot", "float32", "m += kWarp) sums[m] = 0;", "m += kWarp) continue;"),
    "dot: too little shared memory": ("dot", "float32", "sizeof(Acc<T>) * kWarps * number",
                                      "sizeof(Acc<T>) * number"),
    "dot: partials of the second chunk over the first's": ("dot", "float32", "partial + first * blocks",
                                                           "partial"),
    "dot: index in 32 bits": ("index", "float16", "constexpr int64_t kTile", "constexpr int kTile"),
    "sum: index off by one": ("sum", "float32", "load<L>(a.term[m + k] + i)",
                              "load<L>(a.term[m + k] + i + 1)"),
    "sum: tail left out": ("sum", "float32", "i < a.n) sum_pack<T, 1>", "i < 0) sum_pack<T, 1>"),
    "sum: last pack left out": ("sum", "float32", "p < packs; p += thread_count()) sum_pack",
                                "p + 1 < packs; p += thread_count()) sum_pack"),
    "sum: grid not strided": ("sum", "float32", "p += thread_count()) sum_pack", "p += packs) sum_pack"),
    "sum: weights of the second chunk": ("sum", "float32", "SumArgs<T> a{{}, weight + first,",
                                         "SumArgs<T> a{{}, weight,"),
    "sum: first chunk forgotten": ("sum", "float32", "first ? carry : nullptr,", "nullptr,"),
    "sum: alignment of the terms not asked": ("sum", "float32", "aligned(terms, count) && aligned(&out, 1)",
                                              "aligned(&out, 1)"),
    "sum: index in 32 bits": ("index", "float16", "sum_pack(const SumArgs<T>& a, int64_t i)",
                              "sum_pack(const SumArgs<T>& a, int i)"),
    "all: thread number in 32 bits": ("index", "float16", "inline int64_t thread_number()",
                                      "inline int thread_number()"),
    "scale: index in 32 bits": ("index", "float16", "scale_pack(const ScaleArgs<T>& a, int64_t i)",
                                "scale_pack(const ScaleArgs<T>& a, int i)"),
    "scale: wrong output": ("scale", "float32", "store<T, L>(a.out[m] + i", "store<T, L>(a.out[m / 2] + i"),
    "scale: alignment of the outputs not asked":
        ("scale", "float32", "aligned(outs, count) && aligned(&grad, 1)", "aligned(&grad, 1)"),
}  # fmt: skip


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """(name, dtype) -> future of {operator: (status, output)}; name None: the kernels as they are."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to compile the kernels for the CPU")
    source = KERNELS.read_text()
    folder = tmp_path_factory.mktemp("kernels")

    def job(number: int, dtype: str, operators: list[str], text: str) -> dict[str, tuple[int, str]]:
        here = folder / str(number)
        here.mkdir()
        (here / KERNELS.name).write_text(text)
        command = [compiler, *FLAGS, f"-DSCALAR={TYPES[dtype]}", f"-I{here}", f"-I{KERNELS.parent}",
                   f"-I{TESTS}", "-o", str(here / "driver"), str(TESTS / "kernel_driver.cpp")]
        subprocess.run(command, check=True, capture_output=True, text=True)
        results = {}
        for operator in operators:
            run = subprocess.run([here / "driver", operator], capture_output=True, text=True)
            results[operator] = run.returncode, run.stdout + run.stderr
        return results

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        work = [(None, dtype, ["sum", "scale", "dot", "index"], source) for dtype in TYPES]
        work += [(name, dtype, [operator], source.replace(old, new))
                 for name, (operator, dtype, old, new) in MUTATIONS.items()]
        yield {(name, dtype): pool.submit(job, number, dtype, operators, text)
               for number, (name, dtype, operators, text) in enumerate(work)}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("operator", ["sum", "scale", "dot", "index"])
@pytest.mark.parametrize("dtype", TYPES)
def test_kernels_agree_with_a_float64_loop(jobs, dtype, operator):
    status, output = jobs[None, dtype].result()[operator]
    assert status == 0, output


@pytest.mark.parametrize("name", MUTATIONS)
def test_planted_mistake_shows(jobs, name):
    operator, dtype, old, _ = MUTATIONS[name]
    assert KERNELS.read_text().count(old) == 1, f"the text to mutate is not there once: {old}"
    status, output = jobs[name, dtype].result()[operator]
    assert status != 0, "the tests did not notice"
