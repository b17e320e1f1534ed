"""The CUDA kernels, on the CPU by cuda_emulation.h; mistakes planted in them must show."""
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
OPERATORS = {  # the driver that runs them and the file that they are in
    ("kernel_driver.cpp", "mixed_sum_kernels.cuh"): ["sum", "scale", "dot", "grads", "index"],
    ("normalised_sum_driver.cpp", "normalised_sum_kernels.cuh"):
        ["channel_sums", "affine_sums", "numbers", "normalised_index"],
}  # fmt: skip
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
    "grads: weights of the second chunk": ("grads", "float32", "weight ? weight + first : nullptr",
                                           "weight"),
    "grads: outputs of the second chunk": ("grads", "float32", "(weight) std::copy_n(outs + first",
                                           "(weight) std::copy_n(outs"),
    "grads: writes behind the end": ("grads", "float32", "if (i[v] < end) store_scaled", "store_scaled"),
    "grads: another pack's gradient": ("grads", "float32", "a.weight[m + k], grad[v]",
                                       "a.weight[m + k], grad[0]"),
    "grads: alignment of the outputs not asked": ("grads", "float32", " && (!weight || aligned(outs, count))",
                                                  ""),
    "grads: only one lane writes": ("grads", "float32", "if (!a.weight) continue;",
                                           "if (!a.weight || lane != (m + k) % kWarp) continue;"),
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
    "scale: wrong output": ("scale", "float32", "store_scaled(a.out[m] + i", "store_scaled(a.out[m / 2] + i"),
    "scale: alignment of the outputs not asked":
        ("scale", "float32", "aligned(outs, count) && aligned(&grad, 1)", "aligned(&grad, 1)"),
    "channel sums: no barrier":
        ("channel_sums", "float32", "  __syncthreads();\n  for (int i = threadIdx.x; i",
         "  for (int i = threadIdx.x; i"),
    "channel sums: a barrier in a branch":
        ("channel_sums", "float32", "    }\n  }\n  __syncthreads();\n", "    }\n  __syncthreads();\n  }\n"),
    "channel sums: no barrier in the second stage":
        ("channel_sums", "float32", "  __syncthreads();\n  if (threadIdx.x >= kColumns",
         "  if (threadIdx.x >= kColumns"),
    "channel sums: last slab left out": ("channel_sums", "float32", "slab < a.slabs;", "slab < a.slabs - 1;"),
    "channel sums: not shifted": ("channel_sums", "float32", "= load<L>(y);", "= {};"),
    "channel sums: squares not shifted twice":
        ("channel_sums", "float32", "s * (same ? sum[l] + all : all)", "s * all"),
    "channel sums: pixels behind the end":
        ("channel_sums", "float32", "          if (pixel >= layout.pixels) continue;\n", ""),
    "channel sums: slabs not strided":
        ("channel_sums", "float32", "static_cast<int64_t>(a.slabs) * kRun * step", "layout.pixels"),
    "channel sums: threads left over take part":
        ("channel_sums", "float32", "return row() < rows && pack(tile) < packs", "return pack(tile) < packs"),
    "channel sums: channels behind the last": ("channel_sums", "float32", "if (c >= layout.C) continue;", ""),
    "channel sums: alignment of y not asked":
        ("channel_sums", "float32", "aligned(x, pairs) && aligned(y, pairs)", "true"),
    "channel sums: results of the second chunk over the first's":
        ("channel_sums", "float32", "out + first * 2 * C, size", "out, size"),
    "channel sums: index in 32 bits":
        ("normalised_index", "bfloat16", "const int64_t pixel = from + (i + k) * step",
         "const int pixel = (from + (i + k) * step) * layout.C / layout.C"),
    "affine sums: index in 32 bits":
        ("normalised_index", "bfloat16", "int64_t place[kPixels];", "int place[kPixels];"),
    "affine sums: scale of another": ("affine_sums", "float32", "(a.scale[m + k], c,", "(a.scale[m], c,"),
    "affine sums: shift forgotten":
        ("affine_sums", "float32", "term[k][v][l] + shift[k][l]", "term[k][v][l]"),
    "affine sums: scale of the first channels":
        ("affine_sums", "float32", "load<L>(from + c)", "load<L>(from)"),
    "affine sums: begins anew": ("affine_sums", "float32", "a.goes_on = first > 0", "a.goes_on = false"),
    "affine sums: every sum goes on": ("affine_sums", "float32", "a.goes_on && s == 0", "a.goes_on"),
    "affine sums: begins at the first entry": ("affine_sums", "float32", "s ? a.end[s - 1] : 0", "0"),
    "affine sums: one sum too many": ("affine_sums", "float32", "|| a.sums == kMaxSums", ""),
    "affine sums: writes behind the end":
        ("affine_sums", "float32", "      if (inside[v]) store<T, L>", "      store<T, L>"),
    "affine sums: grid not strided":
        ("affine_sums", "float32", "static_cast<int64_t>(a.slabs) * kPixels", "layout.pixels * kPixels"),
    "affine sums: alignment of the results not asked":
        ("affine_sums", "float32", "    wide = wide && aligned(&sum.out, 1);\n", ""),
    "numbers: half of the channels of p":
        ("numbers", "float32", "c < C; c += kThreads)", "c < C / 2; c += kThreads)"),
    "numbers: no barrier":
        ("numbers", "float32", "    __syncthreads();\n    if (threadIdx.x > 0) return;",
         "    if (threadIdx.x > 0) return;"),
    "numbers: terms at the place of z":
        ("numbers", "float32", "a.of_term(row - a.map.K, c)", "a.of_term(row, c)"),
    "numbers: by S2 once": ("numbers", "float32", "2 * by_sums.second", "by_sums.second"),
    "numbers: blocks of p counted twice":
        ("numbers", "float32", "thread_number() - M * kThreads", "thread_number()"),
}  # fmt: skip


PLAIN = [(dtype, operators) for operators in OPERATORS.values() for dtype in TYPES
         if dtype != "float16" or "sum" in operators]  # normalised sums are of the other types


def source_of(operator: str) -> tuple[str, Path]:
    """The driver that runs an operator, the file that its kernels are in."""
    return next((driver, CSRC / name) for (driver, name), found in OPERATORS.items() if operator in found)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """(name, dtype) -> future of {operator: (status, output)}; name None: the kernels as they are."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to compile the kernels for the CPU")
    folder = tmp_path_factory.mktemp("kernels")

    def job(number: int, dtype: str, operators: list[str], old: str, new: str) -> dict[str, tuple[int, str]]:
        here = folder / str(number)
        here.mkdir()
        driver, kernels = source_of(operators[0])
        (here / kernels.name).write_text(kernels.read_text().replace(old, new))
        command = [compiler, *FLAGS, f"-DSCALAR={TYPES[dtype]}", f"-I{here}", f"-I{CSRC}", f"-I{TESTS}",
                   "-o", str(here / "driver"), str(TESTS / driver)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        results = {}
        for operator in operators:
            run = subprocess.run([here / "driver", operator], capture_output=True, text=True)
            results[operator] = run.returncode, run.stdout + run.stderr
        return results

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        work = [(None, dtype, operators, "", "") for dtype, operators in PLAIN]
        work += [(name, dtype, [operator], old, new)
                 for name, (operator, dtype, old, new) in MUTATIONS.items()]
        futures = {}
        for number, (name, dtype, operators, old, new) in enumerate(work):
            future = pool.submit(job, number, dtype, operators, old, new)
            futures |= {(name, dtype, operator): future for operator in operators}
        yield futures
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("dtype, operator", [(dtype, one) for dtype, operators in PLAIN for one in operators])
def test_kernels_agree_with_a_float64_loop(jobs, dtype, operator):
    status, output = jobs[None, dtype, operator].result()[operator]
    assert status == 0, output


@pytest.mark.parametrize("name", MUTATIONS)
def test_planted_mistake_shows(jobs, name):
    operator, dtype, old, _ = MUTATIONS[name]
    assert source_of(operator)[1].read_text().count(old) == 1, f"the text to mutate is not there once: {old}"
    status, output = jobs[name, dtype, operator].result()[operator]
    assert status != 0, "the tests did not notice"
