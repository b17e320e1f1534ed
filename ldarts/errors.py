"""What the scripts print as one line."""
import importlib.util
import textwrap


class InputError(ValueError):
    """Input that the user can put right; the scripts print it as one line and exit with status 2."""


class NotFinite(ArithmeticError):
    """A quantity became NaN or infinite; the scripts print it as one line and exit with status 3."""


def brief(error: BaseException) -> str:
    """One line of a message that may be long, for use within ours."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 120)


def require(module: str, purpose: str, package: str = "") -> None:
    """Raises InputError, beginning with `purpose`, where a module is missing. package: its name for pip"""
    if importlib.util.find_spec(module) is None:
        package = package or module
        raise InputError(f"{purpose} needs {package}, which is not installed: pip install {package}")
