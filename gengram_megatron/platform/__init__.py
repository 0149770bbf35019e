"""The one place that adapts megatron-core to the machine: call `prepare()` before any import
of megatron. Where there is CUDA only the warnings of the import are silenced; where there is
none, `cpu.py` lets the same code run on the CPU."""

from functools import cache

from gengram_megatron.platform import cpu
from gengram_megatron.platform.imports import (
    complete_without_transformer_engine,
    has,
    import_quietly,
)


@cache
def prepare() -> None:
    """Make megatron-core importable and usable on this machine. Safe to call many times."""
    import torch

    without_cuda = not torch.cuda.is_available()
    if without_cuda:
        cpu.stand_in_for_cuda()
    import_quietly(compiled=not without_cuda)
    if not has("transformer_engine"):
        complete_without_transformer_engine()
    if without_cuda:
        cpu.adapt_megatron()
