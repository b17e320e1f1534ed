"""Package of ldarts. If there is a compiler, the fused operators are compiled here; else on first use.

`pip install --no-build-isolation .` compiles for the installed PyTorch. An isolated build has another PyTorch
or none; it leaves the compilation to the first use.
"""
import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
if not any(importlib.util.find_spec(name) for name in ("setuptools.command.bdist_wheel", "wheel")):
    sys.exit(f"ldarts: this setuptools makes no wheels: {sys.executable} -m pip install --upgrade setuptools")


class Libraries(build_ext):
    """Compiles the libraries of ldarts.fused.build into the package."""

    def run(self) -> None:
        if self.inplace or self.editable_mode:
            return
        sys.path.insert(0, str(ROOT))
        import torch

        from ldarts.fused import build
        for part in ("cpu", "cuda") if torch.version.cuda else ("cpu",):
            try:
                build.compile_into(Path(self.build_lib, "ldarts", "built").absolute(), part)
            except Exception as error:
                print(f"ldarts: no fused operators for {part.upper()} yet: {error}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        return []


setup(
    name="ldarts",
    version="0.1.0",
    description="Λ-DARTS (ICLR 2023): architecture search whose cells agree on their operations",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=["ldarts", "ldarts.data", "ldarts.fused", "ldarts.runs", "ldarts.csrc"],
    package_dir={"ldarts.csrc": "csrc"},  # the sources, because the first use may have to compile them
    package_data={"ldarts": ["nasbench201.npz"], "ldarts.csrc": ["*"]},
    ext_modules=[Extension("ldarts.built", [])] if importlib.util.find_spec("torch") else [],
    cmdclass={"build_ext": Libraries},
    python_requires=">=3.10",
    install_requires=["torch>=2.7", "ninja", "numpy"],
    extras_require={"test": ["pytest"], "svhn": ["scipy"], "plot": ["matplotlib"],
                    "tensorboard": ["tensorboard"], "imagenet": ["pillow"],
                    "cuda": ["nvidia-cuda-nvcc~=13.0.0", "nvidia-cuda-cccl~=13.0.0",
                             "nvidia-cuda-crt~=13.0.0", "nvidia-nvvm~=13.0.0"]},  # for PyTorch of CUDA 13.0
)
