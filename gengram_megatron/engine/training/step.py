"""One step: forward and backward of all microbatches through megatron-core's schedule, and one
all-reduce of what all ranks must agree on after it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_utils import (
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
    reduce_aux_losses_tracker_across_ranks,
)
from torch import Tensor
from torch.nn import Module

from gengram_megatron.config.layout import Layout
from gengram_megatron.config.schema import Config
from gengram_megatron.engine.data.batches import split_batch
from gengram_megatron.engine.model.sequence import select_local_tokens


@dataclass(frozen=True)
class StepStatus:
    """The outcome of a step, the same on every rank."""

    loss: float
    """Nats per token over the whole batch."""
    finite: bool
    """Whether the loss and the gradient norm of every rank are finite."""
    stop: bool
    """Whether any rank was asked to stop."""
    writing: bool
    """Whether any rank is still writing its part of a checkpoint."""


def reduce_step_status(
    report: Tensor | None, *, grad_norm: float = 0.0, stop: bool = False, writing: bool = False
) -> StepStatus:
    """Combines what every rank knows of the step into one status. All ranks call this.

    report: what forward_backward returned.
    """
    sums = torch.zeros(5, dtype=torch.float64, device=torch.cuda.current_device())
    # Tensor-parallel ranks hold copies of the report, so only one of them adds it.
    if report is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
        sums[:2] = report
    sums[2:] = torch.tensor([not math.isfinite(grad_norm), stop, writing])
    dist.all_reduce(sums)
    total, tokens, infinite, stops, writers = sums.tolist()
    return StepStatus(
        loss=total / tokens,
        finite=infinite == 0 and math.isfinite(total),
        stop=stops > 0,
        writing=writers > 0,
    )


def slowest_rank(seconds: float) -> float:
    """Returns the longest time of any rank, which the other ranks then wait for. All ranks call
    this."""
    longest = torch.tensor(seconds, dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return longest.item()


def any_rank(flag: bool) -> bool:
    """Returns whether the flag is set on any rank. All ranks call this."""
    flags = torch.tensor(flag, dtype=torch.int32, device=torch.cuda.current_device())
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags.item())


def balance_losses(num_layers: int, num_microbatches: int) -> dict[str, float]:
    """Returns load_balance_loss and router_z_loss of the step, each the mean over layers,
    microbatches and ranks, without its coefficient (a load_balance_loss of 1.0 is a perfect
    balance). It is empty for a dense model."""
    tracker = get_moe_layer_wise_logging_tracker()
    if not tracker:
        return {}
    if "z_loss" in tracker:  # megatron-core 0.16 does not average it over ranks
        all_tokens = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        tracker["z_loss"]["avg_group"] = all_tokens
    reduce_aux_losses_tracker_across_ranks()
    names = {"load_balancing_loss": "load_balance_loss", "z_loss": "router_z_loss"}
    losses = {
        metric: (tracker[tracked]["values"].sum() / (num_layers * num_microbatches)).item()
        for tracked, metric in names.items()
        if tracked in tracker
    }
    clear_aux_losses_tracker()
    return losses


def forward_backward(
    chunks: Sequence[Module],
    microbatches: Iterable[Tensor],
    config: Config,
    layout: Layout,
    forward_only: bool,
) -> Tensor | None:
    """Runs a global batch. Returns, on the last pipeline stage, the sum of the losses of this
    data-parallel rank's samples and the number of scored tokens, [2] float64; on other stages None.

    microbatches: tokens [b, s + 1] of this data-parallel rank for one step. Every rank of a
    pipeline, tensor and context group reads the same ones, because all layers with a memory need
    token ids.
    """
    schedule = get_forward_backward_func()
    with torch.set_grad_enabled(not forward_only):  # the schedules do not set it
        reports = schedule(
            forward_step_func=forward_step,
            # One iterator per chunk: each chunk goes through the microbatches separately.
            data_iterator=_iterators(microbatches, layout),
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=layout.num_microbatches,
            seq_length=config.model.seq_length,
            micro_batch_size=config.train.micro_batch_size,
            forward_only=forward_only,
        )
    return torch.stack([r["loss"] for r in reports]).sum(0) if reports else None


def forward_step(
    batches: Iterator[Tensor], model: Module
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]]:
    """Runs a microbatch forward, as megatron-core's forward_step_func. Returns the output, on the
    last pipeline stage the loss of each token, and the function that reduces it to a scalar
    loss."""
    tokens = next(batches).to(torch.cuda.current_device(), non_blocking=True)
    inputs, labels, mask = split_batch(tokens)
    output = model(inputs, labels)
    return output, partial(loss, mask=select_local_tokens(mask), scored=mask.sum())


def loss(token_losses: Tensor, mask: Tensor, scored: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns this rank's part of the mean loss over the scored tokens of a microbatch, and its
    report: the sum of the losses and the number of tokens.

    token_losses, mask: [b, s_local]. scored: number of tokens of the microbatch that are scored,
    over all context-parallel ranks. Every sample has the same number (a fragment ends in one EOD),
    so the mean over microbatches and ranks is the mean over tokens. megatron-core multiplies by the
    context-parallel size and averages over data- and context-parallel ranks; together these give
    the intended sum over the context-parallel ranks.
    """
    total = (token_losses.float() * mask).sum()
    report = torch.stack([total.detach().double(), mask.sum().double()])
    return total / scored.clamp(min=1), {"loss": report}


def _iterators(
    microbatches: Iterable[Tensor], layout: Layout
) -> Iterator[Tensor] | list[Iterator[Tensor]]:
    """Returns what megatron-core's schedules expect: one iterator, or one per virtual pipeline
    stage."""
    if layout.virtual_pipeline is None:
        return iter(microbatches)
    microbatches = list(microbatches)
    return [iter(microbatches) for _ in range(layout.virtual_pipeline)]
