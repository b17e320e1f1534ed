"""The build of ldarts; pyproject.toml describes the package. If there is a compiler, the fused operators are
compiled here; else on first use.

`pip install --no-build-isolation .` compiles for the installed PyTorch. An isolated build has another PyTorch
or none; it leaves the compilation to the first use.
"""
import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
if not importlib.util.find_spec("setuptools.command.bdist_wheel"):
    sys.exit(f"ldarts needs setuptools 70.1 or newer: {sys.executable} -m pip install --upgrade setuptools")


class Libraries(build_ext):
    """Compiles the libraries of ldarts.fused.build into the package."""

    def run(self) -> None:
        if self.inplace or self.editable_mode:
            return
        sys.path.insert(0, str(ROOT))
        for part in ("cpu", "cuda"):
            try:
                import torch

                from ldarts.fused import build
                if part == "cpu" or torch.version.cuda:
                    build.compile_into(Path(self.build_lib, "ldarts", "built").absolute(), part)
            except Exception as error:
                print(f"ldarts: no fused operators for {part.upper()} yet: {error}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    ext_modules=[Extension("ldarts.built", [])] if importlib.util.find_spec("torch") else [],
    cmdclass={"build_ext": Libraries},
)
