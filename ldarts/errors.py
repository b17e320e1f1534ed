"""What the scripts print as one line: errors, and the progress of long work."""
import importlib.util
import os
import sys
import textwrap
import time
from typing import Callable, Iterable, Iterator


class InputError(ValueError):
    """Input that the user can correct; the scripts print it as one line and exit with status 2."""


class NotFinite(ArithmeticError):
    """A quantity became NaN or infinite; the scripts print it as one line and exit with status 3."""


def brief(error: BaseException) -> str:
    """An error's type and message, cut to 120 characters."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 120)


def require(module: str, purpose: str, package: str = "") -> None:
    """Raises InputError, which names the `purpose`, if a module is missing. package: its name for pip"""
    if importlib.util.find_spec(module) is None:
        package = package or module
        raise InputError(f"{purpose} needs {package}, which is not installed: pip install {package}")


def script(main: Callable[[], None], less_memory: str = "smaller batches") -> None:
    """Run a script's main. InputError, lack of memory and an OSError that names a file print one line to
    standard error and exit with status 2, NotFinite with status 3. less_memory: the remedy if memory runs out

    Characters that the terminal's encoding lacks, such as Λ in ASCII, are printed as escapes.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has no such method
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, NotFinite, OSError, RuntimeError, MemoryError) as error:
        message = str(error)
        if not isinstance(error, (InputError, NotFinite)) and not getattr(error, "filename", None):
            if not (reason := out_of_memory(error)):
                raise
            message = f"out of memory ({reason}); use {less_memory}"
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"error{rank}: {message}", file=sys.stderr, flush=True)
        sys.exit(3 if isinstance(error, NotFinite) else 2)


def out_of_memory(error: BaseException | None) -> str:
    """The message of this error, or of one that caused it, if that is out of memory; else ""."""
    texts = "out of memory", "allocate memory", "bad_alloc", "ALLOC_FAILED"  # of CUDA, CPU, C++, cuDNN
    while error:
        if isinstance(error, MemoryError) or any(text in str(error) for text in texts):
            return brief(error)
        error = error.__cause__ or error.__context__
    return ""


def progress(items: Iterable, what: str, pause: float = 10) -> Iterator:
    """The items. After 10, 30, 70, … seconds a line on standard error names the last one that is done."""
    total = f" of {len(items)}" if hasattr(items, "__len__") else ""
    due = time.monotonic() + pause
    for number, item in enumerate(items, 1):
        yield item
        if time.monotonic() > due and os.environ.get("RANK", "0") == "0":
            print(f"{what} {number}{total}", file=sys.stderr, flush=True)
            pause *= 2
            due += pause
