"""Package metadata. Settings of the tools are in pyproject.toml."""

from pathlib import Path

from setuptools import setup

TRAIN = [
    "transformers>=5.17",
    "trl>=1.16,<1.17",
    "peft>=0.21",
    "accelerate>=1.15",
    "datasets>=4.7",
    "filelock",
    "matplotlib",
    "pandas",
    "pyyaml",
    "requests",
    "rich",
]
DEMO = [*TRAIN, "gguf", "sentencepiece"]
BENCH = ["pytest", "pytest-benchmark[histogram]", "liger-kernel", "cut-cross-entropy", "matplotlib"]
EVIDENCE = [*DEMO, "reasoning-gym"]
DEV = [*DEMO, "bitsandbytes", "hypothesis", "kernels", "mypy", "pytest", "pytest-benchmark"]
DEV += ["pytest-xdist", "ruff", "setuptools>=77"]

setup(
    name="powerflow-fast",
    version="0.1.0",
    description="PowerFlow's Trajectory-Balance loss, fused with the language-model head",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # A top-level `kernels` would shadow Hugging Face's package: see powerflow_fast/kernels.py.
    packages=[
        "powerflow_fast",
        "powerflow_fast.cli",
        "powerflow_fast.data",
        "powerflow_fast.evaluation",
        "powerflow_fast.integrations",
        "powerflow_fast.kernels",
        "powerflow_fast.logprobs",
        "powerflow_fast.models",
        "powerflow_fast.planning",
        "powerflow_fast.training",
    ],
    package_dir={"powerflow_fast.kernels": "kernels"},
    package_data={"powerflow_fast": ["py.typed", "data/*.jsonl"]},
    install_requires=["numpy", "torch>=2.11", "triton>=3.6; platform_system == 'Linux'"],
    extras_require={"train": TRAIN, "demo": DEMO, "bench": BENCH, "evidence": EVIDENCE, "dev": DEV},
    entry_points={"console_scripts": ["powerflow-fast=powerflow_fast.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
