"""The CUDA kernels, on the CPU by cuda_emulation.h; mistakes planted in them must show."""
import collections
import itertools
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
DEVICE_CODE = [CSRC / name for name in ("sums_kernels.cuh", "packs.cuh", "sums_cuda.h", "norms.h")]
OPERATORS = ["channel_sums", "affine_sums", "numbers", "index"]
TYPES = {"float32": "float", "float64": "double", "bfloat16": "__nv_bfloat16", "float16": "__half"}
FLAGS = ["-std=c++17", "-O1", "-w", "-fsanitize=alignment,bounds,signed-integer-overflow",
         "-fsanitize-undefined-trap-on-error"]

# name: (operator whose grid must fail, dtype, text, replacement)
MUTATIONS = {
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
        ("index", "bfloat16", "const int64_t pixel = from + (i + k) * step",
         "const int pixel = (from + (i + k) * step) * layout.C / layout.C"),
    "affine sums: index in 32 bits":
        ("index", "bfloat16", "int64_t place[kPixels];", "int place[kPixels];"),
    "affine sums: scale of another": ("affine_sums", "float32", "(a.scale[m + k], c,", "(a.scale[m], c,"),
    "affine sums: shift forgotten":
        ("affine_sums", "float32", "term[k][v][l] + shift[k][l]", "term[k][v][l]"),
    "affine sums: scale of the first channels":
        ("affine_sums", "float32", "load<L>(from + c)", "load<L>(from)"),
    "affine sums: begins anew": ("affine_sums", "float32", "a.goes_on = m > 0", "a.goes_on = false"),
    "affine sums: every sum goes on": ("affine_sums", "float32", "a.goes_on && s == 0", "a.goes_on"),
    "affine sums: begins at the first entry": ("affine_sums", "float32", "s ? a.end[s - 1] : 0", "0"),
    "affine sums: one sum too many": ("affine_sums", "float32", "|| (m == 0 && a.sums == kMaxSums)", ""),
    "affine sums: writes behind the end":
        ("affine_sums", "float32", "      if (inside[v]) store<T, L>", "      store<T, L>"),
    "affine sums: grid not strided":
        ("affine_sums", "float32", "static_cast<int64_t>(a.slabs) * kPixels", "layout.pixels * kPixels"),
    "affine sums: alignment of the results not asked":
        ("affine_sums", "float32", "    wide = wide && aligned(&sum.out, 1);\n", ""),
    "numbers: half of the channels of p":
        ("numbers", "float32", "c < C; c += kThreads)", "c < C / 2; c += kThreads)"),
    "numbers: no barrier":
        ("numbers", "float32", "      __syncthreads();\n      if (threadIdx.x > 0) return;",
         "      if (threadIdx.x > 0) return;"),
    "numbers: terms at the place of z":
        ("numbers", "float32", "a.write_of_term(row - K, c)", "a.write_of_term(row, c)"),
    "numbers: by S2 once": ("numbers", "float32", "2 * by_var / count}", "by_var / count}"),
    "numbers: blocks of p counted twice":
        ("numbers", "float32", "thread_number() - in_front * kThreads", "thread_number()"),
    "numbers: a term twice, another never":
        ("numbers", "float32", "a.write_of_term(row - K, c)", "a.write_of_term((row - K) / 2, c)"),
    "numbers: p of a channel at the place of z":
        ("numbers", "float32", "a.by_p[i - K * C]", "a.by_p[i]"),
}  # fmt: skip


def planted_together():
    """(names, dtype, their operators): one mistake of each operator, but for those in code that several run."""
    of_operators = collections.defaultdict(list)
    kernels, norms = ((CSRC / name).read_text() for name in ("sums_kernels.cuh", "norms.h"))
    of_one_operator = kernels.partition("struct ChannelSumsArgs")[2] + norms
    for name, (operator, dtype, old, _) in MUTATIONS.items():
        if dtype == "float32" and old in of_one_operator:
            of_operators[operator].append(name)
        else:
            yield [name], dtype, [operator]
    for names in itertools.zip_longest(*of_operators.values()):
        names = [name for name in names if name]
        yield names, "float32", [MUTATIONS[name][0] for name in names]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """(name, dtype, operator) -> future of {operator: (status, output)}; name None: the kernels as they are.

    Mistakes of different operators are planted together: each is in code that the others do not run."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to compile the kernels for the CPU")
    folder = tmp_path_factory.mktemp("kernels")

    def job(number: int, dtype: str, operators: list[str], changes: list) -> dict[str, tuple[int, str]]:
        here = folder / str(number)
        here.mkdir()
        for source in DEVICE_CODE:
            text = source.read_text()
            for old, new in changes:
                text = text.replace(old, new)
            (here / source.name).write_text(text)
        command = [compiler, *FLAGS, f"-DSCALAR={TYPES[dtype]}", f"-I{here}", f"-I{CSRC}", f"-I{TESTS}",
                   "-o", str(here / "driver"), str(TESTS / "sums_driver.cpp")]
        subprocess.run(command, check=True, capture_output=True, text=True)
        results = {}
        for operator in operators:
            run = subprocess.run([here / "driver", operator], capture_output=True, text=True)
            results[operator] = run.returncode, run.stdout + run.stderr
        return results

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {}
        for number, (names, dtype, operators) in enumerate([
                *(([None] * len(OPERATORS), dtype, OPERATORS) for dtype in TYPES), *planted_together()]):
            future = pool.submit(job, number, dtype, operators, [MUTATIONS[n][2:] for n in names if n])
            futures |= {(name, dtype, operator): future for name, operator in zip(names, operators)}
        yield futures
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", TYPES)
def test_kernels_agree_with_a_float64_loop(jobs, dtype, operator):
    status, output = jobs[None, dtype, operator].result()[operator]
    assert status == 0, output


@pytest.mark.parametrize("name", MUTATIONS)
def test_planted_mistake_shows(jobs, name):
    operator, dtype, old, _ = MUTATIONS[name]
    texts = [source.read_text() for source in DEVICE_CODE]
    assert sum(text.count(old) for text in texts) == 1, f"the text to mutate is not there once: {old}"
    status, output = jobs[name, dtype, operator].result()[operator]
    assert status != 0, "the tests did not notice"
