"""What all ranks must know of a step and do alike, in one all-reduce."""

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
    stop: bool
    """A rank was asked to stop."""


def agree(report: Tensor | None, *, stop: bool = False) -> Agreement:
    """Sum up what every rank knows of its step.

    report: what forward_backward returned.
    """
    own = torch.zeros(3, dtype=torch.float64, device=torch.cuda.current_device())
    # Tensor-parallel ranks hold copies.
    if report is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
        own[:2] = report
    own[2] = stop
    dist.all_reduce(own)
    total, tokens, stops = own.tolist()
    return Agreement(loss=total / tokens, stop=stops > 0)
