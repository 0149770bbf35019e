"""What all ranks must know of a step and do alike, in one all-reduce."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """The same on every rank."""

    loss: float
    """Nats a token over the whole batch."""
    finite: bool
    """The loss, and the gradient norm of every rank."""
    stop: bool
    """A rank was asked to stop."""
    writing: bool
    """A rank still writes its part of a checkpoint."""


def agree(
    report: Tensor | None, *, grad_norm: float = 0.0, stop: bool = False, writing: bool = False
) -> Agreement:
    """Sum up what every rank knows of its step.

    report: what forward_backward returned.
    """
    own = torch.zeros(5, dtype=torch.float64, device=torch.cuda.current_device())
    # Tensor-parallel ranks hold copies.
    if report is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
        own[:2] = report
    own[2:] = torch.tensor([not math.isfinite(grad_norm), stop, writing])
    dist.all_reduce(own)
    total, tokens, infinite, stops, writers = own.tolist()
    return Agreement(
        loss=total / tokens,
        finite=infinite == 0 and math.isfinite(total),
        stop=stops > 0,
        writing=writers > 0,
    )


def any_rank(flag: bool) -> bool:
    """Whether a flag is set on any rank. Called by all ranks."""
    flags = torch.tensor(flag, dtype=torch.int32, device=torch.cuda.current_device())
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags.item())
