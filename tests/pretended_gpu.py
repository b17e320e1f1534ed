"""A GPU for machines without one: tensors that say `cuda:0` in the host's memory, with a GPU's prohibitions.

    python tests/pretended_gpu.py train_search.py ARGUMENTS…      # a script on it; ends with its waits

What it holds to, as a real one does: a tensor of the host and one of the device in one operation is an error
(but for indices, and numbers); torch.cuda.set_device wants an index; under capture nothing is computed, and
reading a value back, or sending one, is an error; a graph is the list of operations that were called under
capture, replayed in the same memory with the host's numbers as they were then; autograd works in a thread of
the device; autocast has CUDA's list. It counts by line of code where the host waits for the device. Two of
them are there; a process uses one. The operators of csrc/ compute by their form for CPUs.

What it cannot show: kernels, their choice and their rounding; streams and races; memory, and its reuse by a
graph's pool; what else CUDA forbids under capture (loading a library, choosing a kernel anew, an allocation
by another stream); random numbers within a graph; NCCL, for which gloo stands in; speed.

Wants a CPU-only PyTorch and a C++ compiler.
"""
import collections
import contextlib
import ctypes
import hashlib
import importlib
import importlib.util
import json
import os
import runpy
import shlex
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

HERE = Path(__file__).parent
GPUS = 2
waits = collections.Counter()  # (what, FILE:LINE FUNCTION) -> how often the host waited there


def library() -> Path:
    """pretended_gpu.cpp, compiled once for this PyTorch. Raises OSError or CalledProcessError."""
    torch, source = Path(importlib.util.find_spec("torch").origin).parent, HERE / "pretended_gpu.cpp"
    key = source.read_bytes() + (torch / "version.py").read_bytes()
    path = Path(tempfile.gettempdir(), f"pretended-gpu-{hashlib.sha256(key).hexdigest()[:16]}.so")
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}")
        command = [*shlex.split(os.environ.get("CXX", "g++")), "-std=c++20", "-O1", "-fPIC", "-shared",
                   f"-I{torch}/include", f"-L{torch}/lib", str(source), "-lc10", "-ltorch_cpu",
                   f"-Wl,-rpath,{torch}/lib", "-o", str(partial)]
        subprocess.run(command, check=True, capture_output=True)
        os.replace(partial, path)
    return path


@ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)
def on_wait(kind, operation):
    frame, place = sys._getframe(), operation.decode()
    while frame:
        code = frame.f_code
        if is_own(code.co_filename) and not code.co_name.startswith("<"):  # a comprehension is its function's
            place = f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"
            break
        frame = frame.f_back
    waits[kind.decode(), place] += 1


def install() -> None:
    """Make this process one with a GPU; to be called before PyTorch is imported."""
    assert "torch" not in sys.modules
    loaded = ctypes.CDLL(str(library()))
    import torch
    import torch._dynamo  # looks for what a PyTorch with CUDA has
    import torch.distributed as dist

    loaded.pretended_on_wait(on_wait)
    gpu = torch.ops.pretended

    class Graph:
        def replay(self):
            gpu.replay(self.number)

    class Capture:
        going_on = False

        def __init__(self, graph, stream=None):
            self.graph = graph

        def __enter__(self):
            self.graph.number, Capture.going_on = gpu.begin_capture(), True

        def __exit__(self, *error):
            gpu.end_capture()
            Capture.going_on = False

    class Stream:
        def __init__(self, device):  # without one a stream is of the current GPU, whichever has the tensors
            pass

        def wait_stream(self, other):
            pass

        def synchronize(self):
            pass

    def set_device(device):
        index = torch.cuda._utils._get_device_index(device)
        if index >= GPUS:
            raise RuntimeError("CUDA error: invalid device ordinal")
        gpu.choose_device(index)

    def nothing(*args, **kwargs):
        pass

    pretended = {
        "is_available": lambda: True, "device_count": lambda: GPUS, "is_initialized": lambda: True,
        "_is_compiled": lambda: True, "_is_in_bad_fork": lambda: False, "is_bf16_supported": lambda *a: True,
        "init": nothing, "_lazy_init": nothing, "synchronize": nothing, "empty_cache": nothing,
        "set_device": set_device, "current_device": lambda: torch.empty(0, device="cuda").device.index,
        "get_device_name": lambda *a: "pretended GPU", "get_device_capability": lambda *a: (9, 0),
        "max_memory_allocated": lambda *a: 0, "manual_seed": nothing, "manual_seed_all": nothing,
        "get_rng_state": lambda *a: torch.get_rng_state(),
        "set_rng_state": lambda state, *a: torch.set_rng_state(state),
        "Stream": Stream, "current_stream": Stream, "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": Graph, "graph": Capture, "is_current_stream_capturing": lambda: Capture.going_on,
    }
    for name, value in pretended.items():
        setattr(torch.cuda, name, value)
    torch.UntypedStorage.clone = lambda own: torch.empty(
        own.nbytes(), dtype=torch.uint8, device=own.device).untyped_storage().copy_(own)
    pretend_nccl(dist, gpu)


def is_own(filename: str) -> bool:
    """Whether a file is of this project, and not of the pretence."""
    return filename.startswith(str(HERE.parent)) and filename != __file__ and "/.venv/" not in filename


def pretend_nccl(dist, gpu) -> None:
    """gloo in NCCL's place: on the same memory, by operations that a graph replays."""
    import torch
    names = "init_process_group", "all_reduce", "all_gather", "broadcast"
    calls = {name: getattr(dist, name) for name in names}

    @torch.library.custom_op("pretended::all_reduce", mutates_args=("t",), device_types="cpu")
    def all_reduce(t: torch.Tensor) -> None:
        calls["all_reduce"](t)

    def on_any_device(name):
        def exchange(*args, **kwargs):
            args = [[gpu.on_host(t) for t in arg] if isinstance(arg, list) else
                    gpu.on_host(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
            return calls[name](*args, **kwargs)
        return exchange

    dist.init_process_group = lambda backend, **kwargs: calls["init_process_group"]("gloo", **kwargs)
    dist.all_gather, dist.broadcast = on_any_device("all_gather"), on_any_device("broadcast")
    dist.all_reduce = lambda t, *args: all_reduce(t) if t.is_cuda else calls["all_reduce"](t, *args)


def pretend_engine() -> None:
    """Let the library for CPUs stand for the one for CUDA: the operators find their way by the fallback."""
    from ldarts.fused import build
    hindrance = build.hindrance
    for name, module in list(sys.modules.items()):
        if name.startswith("ldarts.") and getattr(module, "hindrance", None) is hindrance:
            module.hindrance = lambda part: hindrance("cpu")


# ---- processes that have one

class Machine:
    """Starts processes with a pretended GPU, in milliseconds: forked from one that has imported all."""

    def __init__(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen([sys.executable, __file__, "--serve"], text=True, env=environment,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def _ask(self, request) -> int:
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, folder: Path, target: str, *argv, engine: bool = False, **environment) -> int:
        """The process number of `target`, a script of the project or MODULE:FUNCTION of tests/, which runs in
        `folder`, output in <folder>.printed; without the engine, or with its form for CPUs."""
        environment |= {} if engine else {"LDARTS_FUSED": "off"}
        return self._ask([str(folder), target, [str(arg) for arg in argv], engine, environment])

    def wait(self, process: int) -> int:
        """The exit status."""
        return self._ask(process)

    def run(self, *args, **kwargs) -> int:
        return self.wait(self.start(*args, **kwargs))

    def close(self):
        self.server.stdin.close()
        self.server.wait()


def serve():
    install()
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    import train_eval, train_search  # noqa: so that the processes find them imported
    replies, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, int):
            answer = os.waitstatus_to_exitcode(os.waitpid(request, 0)[1])
        elif not (answer := os.fork()):
            child(*request)
        print(answer, file=replies, flush=True)


def child(folder, target, argv, engine, environment):
    """Never returns."""
    printed = os.open(folder + ".printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(printed, stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    os.environ.update(environment)
    os.chdir(folder)
    leave(lambda: run(target, argv, engine))


def run(target, argv, engine):
    import torch
    torch.set_num_threads(1)
    if engine:
        pretend_engine()
    module, _, function = target.partition(":")
    if function:
        return getattr(importlib.import_module(module), function)(*argv)
    sys.argv = [target, *argv]
    runpy.run_path(str(HERE.parent / target), run_name="__main__")


def leave(function) -> None:
    """Call a function and end the process by its status, without the ends of the threads of autograd."""
    status = 0
    try:
        function()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    for (kind, place), count in sorted(waits.items()):
        print(f"{kind} {count} times: {place}")
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.modules["pretended_gpu"] = sys.modules["__main__"]
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        install()
        sys.path[:0] = [str(HERE.parent), str(HERE)]
        leave(lambda: run(sys.argv[1], sys.argv[2:], os.environ.get("LDARTS_FUSED") != "off"))
