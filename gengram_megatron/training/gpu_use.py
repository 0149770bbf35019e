"""What a run makes of its GPUs: model FLOP utilisation and peak memory."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from gengram_megatron.config.schema import Config
from gengram_megatron.plan.flops import (
    PEAK_BF16_FLOPS,
    model_flops_utilisation,
    training_flops,
)


@dataclass(frozen=True)
class GpuUse:
    """Measures each training step. On CPUs there is nothing to measure.

    Attributes:
        device: the name that the GPU gives itself; None: a CPU.
        devices: GPUs of the run.
        flops_per_token: of the model, forward and backward.
    """

    device: str | None
    devices: int
    flops_per_token: int

    @classmethod
    def of_run(cls, config: Config, devices: int) -> "GpuUse":
        """For a run on so many devices of the kind that this process uses."""
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        return cls(name, devices, training_flops(config))

    def of_step(self, tokens_per_second: float) -> dict[str, float]:
        """The numbers for the metrics; none on a CPU. Called by all ranks.

        Returns peak_memory_bytes, the most that torch has had allocated at a time since the start
        of this job, on the rank with the most, and model_flops_utilisation where it is known.
        """
        if self.device is None:
            return {}
        device = torch.cuda.current_device()
        most = torch.tensor(torch.cuda.max_memory_allocated(), device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        numbers = {"peak_memory_bytes": int(most)}
        if (share := self.utilisation(tokens_per_second)) is not None:
            numbers["model_flops_utilisation"] = share
        return numbers

    def utilisation(self, tokens_per_second: float) -> float | None:
        """Model FLOP utilisation (MFU): the share of all GPUs' peak that the model's own
        arithmetic takes, from 0 to 1; None for a device that PEAK_BF16_FLOPS does not have.

        It is tokens_per_second x flops_per_token / (devices x peak). The peak is the dense one in
        bf16, whatever train.precision is. flops_per_token counts the matrix products that a token
        needs forward and backward, as `gengram plan` does: of the experts only those that it goes
        to, half of the square in causal attention, and of Gengram the maps of each token's
        features to key and value, also where the tables are projected instead. What is computed
        again in the backward pass does not count, nor do look-ups, norms and the optimizer.

        tokens_per_second: over all ranks, in a step; validations and checkpoints lie between.
        """
        peak = PEAK_BF16_FLOPS.get(self.device)
        if peak is None:
            return None
        return model_flops_utilisation(tokens_per_second, self.flops_per_token, self.devices * peak)
