"""Package metadata. ``kernels/`` is installed as ``fastscore_kernels``.

``kernels/`` has no ``__init__.py`` on purpose: transformers looks for a package named ``kernels`` and would take ours.
Both packages are therefore listed by hand instead of found.
"""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent

ACCELERATE = "accelerate>=1.8,<2"

EXTRAS = {
    "gguf": ["gguf>=0.17,<1", ACCELERATE],  # transformers reads GGUF files with both
    "lora": ["peft>=0.17,<1"],
    "device-map": [ACCELERATE],
    "flash-attn": ["flash-attn>=2.7,<3; platform_system == 'Linux'"],
    "datasets": ["datasets>=4,<6"],
    "tables": ["pyarrow>=21"],  # Parquet and Arrow files
    "quantize": ["torchao>=0.18,<1"],
    "lm-eval": ["lm-eval==0.4.13", ACCELERATE],  # one version: the model class is made of the harness's own HFLM
    "ray": ["ray[data]>=2.50,<3"],
    "report": ["jinja2>=3.1,<4", "vl-convert-python>=1.9,<2"],
    "bench": ["matplotlib>=3.9"],  # bench/plot.py
    "fuzz": ["atheris>=2.3,<4; platform_system == 'Linux'", "gguf>=0.17,<1"],  # tests/fuzz/ holds headers against gguf
}
EXTRAS["all"] = sorted(
    {
        requirement
        for name in ("gguf", "lora", "device-map", "datasets", "tables", "report")
        for requirement in EXTRAS[name]
    }
)
EXTRAS["dev"] = [
    *EXTRAS["all"],
    *EXTRAS["bench"],
    *EXTRAS["lm-eval"],
    *EXTRAS["ray"],
    "hypothesis>=6.130",
    "mypy>=1.15",
    "pytest>=8.3",
    "pytest-benchmark>=5.1",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.11",
    "sentence-transformers>=5,<6",  # its losses read what --format writes
    "sentencepiece>=0.2",
    "trl>=1.16,<2; python_version >= '3.11'",
    "types-setuptools",
]

setup(
    name="fastscore",
    version="0.1.0",
    description="Teacher scores from causal language models: no padding, every shared prefix computed once",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        "fastscore",
        "fastscore.attention",
        "fastscore.decoder",
        "fastscore.integrations",
        "fastscore.report",
        "fastscore_kernels",
    ],
    package_dir={"fastscore_kernels": "kernels"},
    package_data={
        "fastscore": ["py.typed"],
        "fastscore.report": ["templates/*"],
        "fastscore_kernels": ["py.typed", "*.json"],
    },
    install_requires=[
        "numpy>=1.26",
        "platformdirs>=4.2,<5",
        "rich>=13.7,<16",
        "safetensors>=0.4.5",
        "tokenizers>=0.21",
        "torch>=2.11",
        "transformers>=5.17,<6",
        "triton>=3.6; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "typer>=0.15,<1",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["fastscore = fastscore.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
