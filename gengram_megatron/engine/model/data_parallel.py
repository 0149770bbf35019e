"""Gradients of a model chunk, summed in float32 over microbatches and over the data-parallel ranks.

Where apex or Transformer Engine is installed, the matrix product that makes a weight's gradient
adds it to the float32 sum itself (gradient accumulation fusion). Otherwise the product writes a
tensor as large as the weight, and another kernel adds it up.

Tables whose rows the data- or expert-parallel ranks share are no copies of one another: a row's
gradient comes whole from its own lookups (gengram/tables.py) and is summed only over ranks that
hold the same rows. megatron-core knows two kinds of parameters, copied ones and experts; the tables
would need a third, so they get a DistributedDataParallel of their own, in which they count as
experts whose copies are those ranks.
"""

from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, layers
from torch import nn


def apex_adds_up() -> bool:
    """Whether megatron-core has found apex's extension fused_weight_gradient_mlp_cuda, and there is
    a GPU for it."""
    return layers._grad_accum_fusion_available and torch.cuda.is_available()


def fuse_accumulation(chunk: nn.Module, apex: bool) -> None:
    """Have a model's linear layers add up gradients wherever they can. Their weights must get a
    `main_grad`, as those in megatron-core's DistributedDataParallel have.

    megatron-core's own switch, gradient_accumulation_fusion, is one for both libraries and refuses
    to be on without apex.
    """
    for module in chunk.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module.gradient_accumulation_fusion = apex
        elif hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def fused_by(modules: list[nn.Module]) -> str | None:
    """Who adds up gradients in these modules; None: nobody."""
    libraries = {
        "apex": any(getattr(m, "gradient_accumulation_fusion", False) for m in modules),
        "Transformer Engine": any(getattr(m, "fuse_wgrad_accumulation", False) for m in modules),
    }
    return " and ".join(name for name, used in libraries.items() if used) or None


_singles: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


class DataParallel(DistributedDataParallel):
    """megatron-core's, with row_tables: another one around this chunk's tables split by rows over
    data- or expert-parallel ranks; None where the config has no such tables."""

    def __init__(self, config, ddp_config: DistributedDataParallelConfig, module, rows_over, **kw):
        tables = [p for p in module.parameters() if getattr(p, "rows_over", None)]
        with frozen(tables):
            super().__init__(config=config, ddp_config=ddp_config, module=module, **kw)
        self.table_parameters = tables
        self.row_tables = None
        if rows_over is not None:
            plain = replace(ddp_config, overlap_grad_reduce=False, overlap_param_gather=False)
            groups = row_table_groups(rows_over)
            self.row_tables = DistributedDataParallel(
                config=config,
                ddp_config=plain,
                module=nn.ParameterList(tables),
                pg_collection=groups,
            )
            self.row_tables.groups = groups

    def zero_grad_buffer(self):
        """Both kinds of gradients, before a step."""
        super().zero_grad_buffer()
        if self.row_tables is not None:
            self.row_tables.zero_grad_buffer()

    def finish_grad_sync(self, *args, **kwargs):
        """Both kinds of gradients, after the last microbatch."""
        super().finish_grad_sync(*args, **kwargs)
        if self.row_tables is not None:
            self.row_tables.finish_grad_sync()


def unwrapped(chunks: list[nn.Module]) -> list[nn.Module]:
    """The model chunks inside what an engine and bf16 wrap around them."""
    found = []
    for chunk in chunks:
        while hasattr(chunk, "module"):
            chunk = chunk.module
        found.append(chunk)
    return found


@contextmanager
def frozen(parameters: list[nn.Parameter]):
    """Excludes parameters from what is made in this block from those that need gradients: megatron-
    core's DistributedDataParallel and its optimizer."""
    for parameter in parameters:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad = True


def row_table_groups(over: str) -> ProcessGroupCollection:
    """megatron-core's groups, and as the experts' copies the ranks that hold the same rows."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if over == "data":
        groups.expt_dp = _alone()
        groups.tp_ep_pp = dist.group.WORLD  # over which the gradients' norm is summed
    return groups


def _alone() -> dist.ProcessGroup:
    """The group of this rank only. Made once: making a group is for all ranks to do together."""
    world = dist.group.WORLD
    if world not in _singles:
        made = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        _singles.clear()
        _singles[world] = made[dist.get_rank()]
    return _singles[world]
