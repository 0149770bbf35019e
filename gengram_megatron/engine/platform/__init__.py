"""The one place that adapts megatron-core (0.16.1) to the machine.

`prepare` runs when `gengram_megatron.engine` is imported, and so before any import of megatron.
Where there is CUDA it only silences the warnings of megatron-core's import, and mends what it
leaves undefined without Transformer Engine; where there is none, `cpu.py` lets the same code run on
the CPU.
"""

import importlib
import importlib.util
import warnings
from functools import cache

import torch

from gengram_megatron.engine.platform import cpu


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


@cache
def prepare() -> None:
    """Make megatron-core importable and usable on this machine. Safe to call many times."""
    without_cuda = not torch.cuda.is_available()
    if without_cuda:
        cpu.stand_in_for_cuda()
    import_quietly(compiled=not without_cuda)
    if not has("transformer_engine"):
        complete_without_transformer_engine()
    if without_cuda:
        cpu.adapt_megatron()
