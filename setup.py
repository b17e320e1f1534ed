"""Package of ldarts. Where a compiler is, the fused operators are compiled here; else on their first use.

`pip install --no-build-isolation .` compiles against the PyTorch that is installed; an isolated build sees
another one or none and leaves the compiling to the first use.
"""
import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
if not any(importlib.util.find_spec(name) for name in ("setuptools.command.bdist_wheel", "wheel")):
    sys.exit(f"ldarts: this setuptools makes no wheels: {sys.executable} -m pip install --upgrade setuptools")


class Libraries(build_ext):
    """Puts the libraries of ldarts.fused.build into the package; the first use compiles one that fails."""

    def run(self) -> None:
        if self.inplace or self.editable_mode:
            return
        sys.path.insert(0, str(ROOT))
        import torch

        from ldarts.fused import build
        root = Path(self.build_lib, "ldarts", "built").absolute()
        shutil.rmtree(root, ignore_errors=True)  # of other sources
        for part in ("cpu", "cuda") if torch.version.cuda else ("cpu",):
            try:
                build.compile_into(root, part)
            except Exception as error:
                print(f"ldarts: no fused operators for {part.upper()} yet: {error}", file=sys.stderr)
        for path in root.glob("*/*"):
            if path.name not in (build.LIBRARY, "manifest.json"):
                path.unlink()

    def get_outputs(self) -> list[str]:
        return []


setup(
    name="ldarts",
    version="0.1.0",
    description="Λ-DARTS (ICLR 2023): differentiable architecture search whose cells agree on their "
                "operations",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=["ldarts", "ldarts.data", "ldarts.fused", "ldarts.runs", "ldarts.study", "ldarts.csrc"],
    package_dir={"ldarts.csrc": "csrc"},
    # csrc, because the first use compiles it where this did not
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
