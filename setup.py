"""Package of ldarts; dependencies are stated here, tested versions in requirements.txt."""
from pathlib import Path

from setuptools import setup

setup(
    name="ldarts",
    version="0.1.0",
    description="Λ-DARTS (ICLR 2023): differentiable architecture search whose cells agree on their operations",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=["ldarts"],
    python_requires=">=3.10",
    install_requires=["torch>=2.7", "ninja", "numpy"],
    extras_require={"test": ["pytest"], "svhn": ["scipy"]},
)
