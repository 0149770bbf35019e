"""Adapts megatron-core (0.16.1) to the machine. No other module does.

`prepare` runs when `gengram_megatron.engine` is imported, and so before any import of megatron.
With CUDA it only silences the warnings of megatron-core's import and fixes what megatron-core
leaves undefined without Transformer Engine. Without CUDA, `cpu.py` also lets the same code run on
the CPU.
"""

import importlib
import importlib.util
import warnings
from functools import cache
from typing import Any

import torch

from gengram_megatron.engine.platform import cpu


def has(package: str) -> bool:
    """Returns whether a top-level package can be imported."""
    return importlib.util.find_spec(package) is not None


def import_quietly(compiled: bool) -> None:
    """Imports megatron-core and silences its warnings, at import and later, about packages that are
    not installed. What is used instead is printed in one line when a run starts.

    compiled: whether megatron-core's small fused functions go through torch.compile. On the CPU
    that needs a C++ compiler and takes longer than the steps of a smoke run.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    # torch 2.13 renames collectives that megatron-core calls by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    compiler = torch.compile
    if not compiled:
        torch.compile = lambda function: function  # type: ignore[assignment]  # a decorator
    try:
        importlib.import_module("megatron.core.models.gpt")
        importlib.import_module("megatron.core.optimizer")
    finally:
        torch.compile = compiler


def patch_missing_transformer_engine() -> None:
    """Fixes what megatron-core leaves undefined if Transformer Engine is not installed, on CPUs and
    GPUs."""
    core = "megatron.core."
    # The router tests `te_general_gemm is not None`, a name that its failed import left undefined.
    router: Any = importlib.import_module(core + "transformer.moe.moe_utils")
    router.te_general_gemm = None
    # Latent attention concludes that Transformer Engine is installed from the fact that it can
    # import megatron-core's wrappers for it.
    attention: Any = importlib.import_module(core + "transformer.multi_latent_attention")
    attention.HAVE_TE = False
    # The default fp8=False counts as on (`fp8 is not None`), which needs Transformer Engine.
    random: Any = importlib.import_module(core + "tensor_parallel.random")
    random.CheckpointWithoutOutput.__init__.__defaults__ = (None,)


@cache
def prepare() -> None:
    """Makes megatron-core importable and usable on this machine. It can be called repeatedly."""
    without_cuda = not torch.cuda.is_available()
    if without_cuda:
        cpu.stand_in_for_cuda()
    import_quietly(compiled=not without_cuda)
    if not has("transformer_engine"):
        patch_missing_transformer_engine()
    if without_cuda:
        cpu.adapt_megatron()
