"""Sums the gradients of a model chunk in float32 over microbatches and over data-parallel ranks.

With apex or Transformer Engine installed, the matrix product that computes a weight's gradient also
adds it to the float32 sum (gradient accumulation fusion). Otherwise the product writes a tensor as
large as the weight, and another kernel adds that to the sum.

Where a table's rows are split over data- or expert-parallel ranks, the ranks do not hold copies of
one another. The backward pass of the look-up sends the gradients of a row to the rank that holds
it (gengram/tables.py), and after that they are summed only over ranks that hold the same rows.
megatron-core distinguishes two kinds of parameters, replicated ones and experts; such tables would
be a third kind. So they get a separate DistributedDataParallel, which treats them as experts whose
data-parallel group is the ranks that hold the same rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, layers
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

TRANSFORMER_ENGINE_SWITCH = "fuse_wgrad_accumulation"
"""The attribute of Transformer Engine's layers that turns gradient accumulation fusion on."""


def apex_fusion_available() -> bool:
    """Returns whether megatron-core has found apex's extension fused_weight_gradient_mlp_cuda and
    there is a GPU to run it on."""
    return layers._grad_accum_fusion_available and torch.cuda.is_available()


def fuse_accumulation(chunk: nn.Module, apex: bool) -> None:
    """Turns on gradient accumulation fusion in all linear layers that support it. Their weights
    must get a `main_grad`, as they do in megatron-core's DistributedDataParallel.

    The switch in megatron-core's config, gradient_accumulation_fusion, is not used: it controls
    both libraries at once and cannot be on without apex.
    """
    for module in chunk.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module.gradient_accumulation_fusion = apex
        elif hasattr(module, TRANSFORMER_ENGINE_SWITCH):
            setattr(module, TRANSFORMER_ENGINE_SWITCH, True)


def gradient_fusion(modules: list[nn.Module]) -> str | None:
    """Returns the libraries whose layers in `modules` fuse gradient accumulation, or None if there
    are no such layers."""
    libraries = {
        "apex": any(getattr(m, "gradient_accumulation_fusion", False) for m in modules),
        "Transformer Engine": any(getattr(m, TRANSFORMER_ENGINE_SWITCH, False) for m in modules),
    }
    return " and ".join(name for name, used in libraries.items() if used) or None


_single_rank_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


class DataParallel(DistributedDataParallel):
    """megatron-core's DistributedDataParallel, plus a second one for tables split by rows.

    row_tables: the DistributedDataParallel of this chunk's tables that are split by rows over the
        data- or expert-parallel ranks; None if the config has no such tables.
    """

    def __init__(
        self,
        config: TransformerConfig,
        ddp_config: DistributedDataParallelConfig,
        module: nn.Module,
        rows_over: str | None,
        **kw: Any,
    ):
        tables = [p for p in module.parameters() if getattr(p, "rows_over", None)]
        with frozen(tables):
            super().__init__(config=config, ddp_config=ddp_config, module=module, **kw)
        self.table_parameters = tables
        self.row_tables = None
        if rows_over is not None:
            without_overlap = replace(
                ddp_config, overlap_grad_reduce=False, overlap_param_gather=False
            )
            groups = row_table_groups(rows_over)
            self.row_tables = DistributedDataParallel(
                config=config,
                ddp_config=without_overlap,
                module=nn.ParameterList(tables),
                pg_collection=groups,
            )
            self.row_tables.groups = groups

    def zero_grad_buffer(self) -> None:
        """Zeroes the gradients of the chunk and of its row tables, before a step."""
        super().zero_grad_buffer()
        if self.row_tables is not None:
            self.row_tables.zero_grad_buffer()

    def finish_grad_sync(self, *args: Any, **kwargs: Any) -> None:
        """Finishes summing the gradients of both over the ranks, after the last microbatch."""
        super().finish_grad_sync(*args, **kwargs)
        if self.row_tables is not None:
            self.row_tables.finish_grad_sync()


def unwrap(chunks: Sequence[nn.Module]) -> list[nn.Module]:
    """Returns the model chunks without the wrappers that the training engine and bf16 add."""
    models = []
    for chunk in chunks:
        while hasattr(chunk, "module"):
            chunk = chunk.get_submodule("module")
        models.append(chunk)
    return models


@contextmanager
def frozen(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Excludes parameters from any DistributedDataParallel or optimizer built in this context, by
    turning their requires_grad off; it is on afterwards."""
    for parameter in parameters:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad = True


def row_table_groups(over: str) -> ProcessGroupCollection:
    """Returns megatron-core's process groups, changed so that the data-parallel group of experts is
    the ranks that hold the same rows. over: the group that splits the rows, data or expert."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if over == "data":
        groups.expt_dp = _single_rank_group()
        groups.tp_ep_pp = dist.group.WORLD  # the gradient norm is summed over it
    return groups


def _single_rank_group() -> dist.ProcessGroup:
    """Returns the process group that contains only this rank. It is created once per world, because
    all ranks must create a group together."""
    world = dist.group.WORLD
    assert world is not None  # the processes have joined
    if world not in _single_rank_groups:
        groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        _single_rank_groups.clear()
        _single_rank_groups[world] = groups[dist.get_rank()]
    return _single_rank_groups[world]
