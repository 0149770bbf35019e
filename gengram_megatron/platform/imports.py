"""Import megatron-core without its wall of warnings, and mend what every machine needs.

Written for megatron-core 0.16.1."""

import importlib
import importlib.util
import warnings

import torch

# Everything that warns at import because Transformer Engine or apex is missing.
_NOISY = (
    "megatron.core",
    "megatron.core.models.gpt",
    "megatron.core.models.backends",
    "megatron.core.optimizer",
    "megatron.core.distributed",
    "megatron.core.dist_checkpointing",
    "megatron.core.transformer.moe.moe_layer",
)


def has(package: str) -> bool:
    """Whether a top-level package can be imported here."""
    return importlib.util.find_spec(package) is not None


def import_quietly(compiled: bool) -> None:
    """Import megatron-core once with warnings off. What is used instead of the missing
    parts is said in one line when a run starts (`report.py`).

    compiled: whether megatron-core's small fused functions go through torch.compile. On the CPU
    that takes a C++ compiler and longer than a smoke run's steps.
    """
    compiler = torch.compile
    if not compiled:
        torch.compile = lambda function: function
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in _NOISY:
                importlib.import_module(name)
    finally:
        torch.compile = compiler


def complete_router(megatron_without_transformer_engine: bool) -> None:
    """moe_utils tests `te_general_gemm is not None`, but defines the name only where
    Transformer Engine is installed: without this the router raises NameError, on GPUs too."""
    if megatron_without_transformer_engine:
        moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
        moe_utils.te_general_gemm = None
