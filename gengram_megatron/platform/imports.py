"""Import megatron-core without its wall of warnings, and mend what every machine needs.

Written for megatron-core 0.16.1."""

import importlib
import importlib.util
import warnings

import torch


def has(package: str) -> bool:
    """Whether a top-level package can be imported here."""
    return importlib.util.find_spec(package) is not None


def import_quietly(compiled: bool) -> None:
    """Import megatron-core without the warnings that it gives, at import and later, about parts
    that are not installed. What is used instead is said in one line when a run starts.

    compiled: whether megatron-core's small fused functions go through torch.compile. On the CPU
    that takes a C++ compiler and longer than a smoke run's steps.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    # torch 2.13 renames collectives that megatron-core calls by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    compiler = torch.compile
    if not compiled:
        torch.compile = lambda function: function
    try:
        importlib.import_module("megatron.core.models.gpt")
        importlib.import_module("megatron.core.optimizer")
    finally:
        torch.compile = compiler


def complete_without_transformer_engine() -> None:
    """Mend what megatron-core leaves undefined where Transformer Engine is not installed, on
    GPUs too."""
    core = "megatron.core."
    # The router asks `te_general_gemm is not None`, a name that it failed to import.
    importlib.import_module(core + "transformer.moe.moe_utils").te_general_gemm = None
    # Latent attention takes the import of the wrappers for that of Transformer Engine.
    importlib.import_module(core + "transformer.multi_latent_attention").HAVE_TE = False
    # Its default fp8=False means True (`fp8 is not None`), which needs Transformer Engine.
    random = importlib.import_module(core + "tensor_parallel.random")
    random.CheckpointWithoutOutput.__init__.__defaults__ = (None,)
