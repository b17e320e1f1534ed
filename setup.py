"""Package of ldarts. Where a compiler is, the fused sum is compiled here; else on its first use.

`pip install --no-build-isolation .` compiles against the PyTorch that is installed; an isolated build sees
another one or none and leaves the compiling to the first use.
"""
import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def extension() -> dict:
    """Arguments of setup() that build ldarts/_C, or none without PyTorch or a compiler."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension, get_cxx_compiler
    except ImportError:
        return {}
    if not shutil.which(get_cxx_compiler()):
        return {}
    # By its path, because importing the package would import all of it.
    spec = importlib.util.spec_from_file_location("build", ROOT / "ldarts" / "fused" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = module.build_options()
    make, flags = CppExtension, options["cflags"]
    if options["cuda"]:
        make, flags = CUDAExtension, {"cxx": options["cflags"], "nvcc": options["nvcc"]}
    sources = [str(Path(source).relative_to(ROOT)) for source in options["sources"]]
    return {"ext_modules": [make("ldarts._C", sources, extra_compile_args=flags,
                                 extra_link_args=[flag for flag in options["cflags"] if flag == "-fopenmp"])],
            "cmdclass": {"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)}}


try:
    built = extension()
except Exception as error:  # a machine where it cannot be compiled still runs the reference
    print(f"ldarts: the fused sum will be compiled on its first use: {error}", file=sys.stderr)
    built = {}
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
    python_requires=">=3.10",
    install_requires=["torch>=2.7", "ninja", "numpy"],
    extras_require={"test": ["pytest"], "svhn": ["scipy"], "plot": ["matplotlib"],
                    "tensorboard": ["tensorboard"], "imagenet": ["pillow"]},
    **built,
)
