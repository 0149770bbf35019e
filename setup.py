"""Packaging of gengram-megatron. Every dependency has its reason beside it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "gengram_megatron/__init__.py").read_text())[1]

HUGGING_FACE = [
    "safetensors>=0.5",  # the files that exported weights lie in
    "tokenizers>=0.22",  # makes the exported tokenizer
    "transformers>=5",  # loads exported models; 5 names experts as our modelling file does
]

setup(
    name="gengram-megatron",
    version=VERSION,
    description="Pretraining of genomic language models with Gengram memory, on megatron-core",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["gengram_megatron*", "data_prep*"]),
    entry_points={
        "console_scripts": [
            "gengram = gengram_megatron.__main__:main",
            "gengram-data = data_prep.cli:main",
        ]
    },
    install_requires=[
        # The model, its parallel layouts, optimizer, datasets and checkpoints. The version is
        # pinned by minor release because gengram_megatron/engine/platform changes private
        # parts of it.
        "megatron-core>=0.16.1,<0.17",
        "torch>=2.10",  # grouped_mm in torch.nn.functional, also on the CPU
        "numpy>=1.26",  # token arrays, and the arithmetic of data preparation
        "pyyaml>=6.0",  # YAML with line numbers, for error messages that name the line
        "pydantic>=2.7",  # the schema that every config is checked against
        "psutil>=5.9",  # megatron-core's checkpoint writers want it, and hang without
        "typer>=0.12",  # the command line and its --help
        "rich>=13.7",  # progress lines and tables
        "requests>=2.31",  # downloads, through the proxies that the environment names
        "urllib3>=2",  # tries again with backoff, beneath requests
        "xopen>=2.1",  # gzip (with isal, its fastest reader), bzip2, xz; zstd since 2.1
        "sentencepiece>=0.2",  # reads the published tokenizer
        "matplotlib>=3.8",  # loss.png and the figures of the benchmarks
        "tensorboard>=2.16",  # event files in the run's folder
    ],
    extras_require={
        # model.implementation: transformer_engine, with it train.precision: fp8, and its fused Adam
        # wherever it is installed. It is compiled against torch and CUDA: install those first, and
        # add --no-build-isolation. The range is the one that megatron-core 0.16.1 is
        # developed with.
        "te": ["transformer-engine[pytorch]>=2.9.0a0,<2.12"],
        # train.engine: deepspeed. Its set-up looks for torch: install that first, and add
        # --no-build-isolation. The range is the version whose private parts the engine uses.
        "deepspeed": ["deepspeed>=0.19.8,<0.20"],
        "wandb": ["wandb>=0.17"],  # logging.wandb
        "hf": HUGGING_FACE,  # gengram checkpoint export, and import of what it wrote
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",  # two test files at a time
            "hypothesis>=6.100",
            "ruff==0.17.6",
            "mypy==2.4.1",  # checks the types of both packages
            "types-psutil",
            "types-PyYAML",
            "types-requests",
            "coverage>=7.10",  # scripts/coverage.sh; 7.10 follows the processes that tests start
            "dnaio>=1.2",  # an independent reader of FASTA, for tests and benchmarks
            *HUGGING_FACE,
        ],
    },
)
