"""One interface to DeepSpeed's (0.19.8) three ZeRO optimizers, for what a step needs from them and
each of them provides in a different way."""

import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class ZeroOneAndTwo:
    """DeepSpeedZeroOptimizer.

    flat: this rank's part of the float32 weights, which Adam updates: one or more tensors per
    parameter group.
    """

    flat: list[Tensor]

    def __init__(self, zero: Any):
        self.zero, self.flat = zero, zero.single_partition_of_fp32_groups

    def link_states(self) -> None:
        """Links each weight to its part of Adam's states. DeepSpeed would do so after the step of
        the first parameter group, when the other groups have no states yet."""
        self.zero._lazy_init_hp_params_optimizer_state()

    def norm(self) -> float:
        """Returns the norm of the gradients of all ranks; negative if it is not finite."""
        return float(self.zero.scaled_global_norm())

    def skip_step_if(self, rejected: Callable[[], bool]) -> None:
        """Makes the next step call `rejected`, and skip the update if it returns True, as DeepSpeed
        does when gradients overflow."""

        def check(**_: Any) -> None:
            self.zero.overflow = rejected()

        self.zero.check_grad_overflow, self.zero.check_overflow = True, check


class ZeroOneInBf16(ZeroOneAndTwo):
    """BF16_Optimizer, which skips a step whose gradient norm is not finite."""

    def __init__(self, zero: Any):
        self.zero, self.flat = zero, zero.fp32_groups_flat_partition
        self._gradients = zero.get_grads_for_norm

    def norm(self) -> float:
        """Returns the norm of the gradients of all ranks. This optimizer keeps those of experts
        apart from the others."""
        gradients, expert_gradients = self._gradients()
        mpu, utils = self.zero.mpu, _utils()
        norm = utils.get_global_norm_of_tensors(gradients, mpu=mpu)
        return float(utils.get_norm_with_moe_layers(norm, mpu=mpu, expert_tensors=expert_gradients))

    def skip_step_if(self, rejected: Callable[[], bool]) -> None:
        """Makes the next step call `rejected`, and if it returns True, gives the step a gradient
        that is not finite."""

        def gradients(for_clipping: bool = False) -> Any:
            if not for_clipping and rejected():
                return [torch.tensor(math.nan, device=torch.cuda.current_device())], {}
            return self._gradients(for_clipping)

        self.zero.get_grads_for_norm = gradients


class ZeroThree(ZeroOneAndTwo):
    """DeepSpeedZeroOptimizer_Stage3."""

    def __init__(self, zero: Any):
        self.zero, self.flat = zero, zero.fp32_partitioned_groups_flat

    def link_states(self) -> None:
        """Does nothing: this optimizer looks the states up each time."""

    def norm(self) -> float:
        """Returns the norm of the gradients of all ranks, from the norms of the parameter
        groups."""
        return float(_utils().combine_grad_norm_groups(self.zero._get_norm_groups()))

    def skip_step_if(self, rejected: Callable[[], bool]) -> None:
        """Makes the next step call `rejected`, and skip the update if it returns True; this
        optimizer checks for overflow in another method."""

        def check(**_: Any) -> None:
            self.zero.overflow = rejected()

        self.zero._overflow_check_and_loss_scale_update = check


def _utils() -> ModuleType:
    return importlib.import_module("deepspeed.runtime.utils")


KINDS = {
    "DeepSpeedZeroOptimizer": ZeroOneAndTwo,
    "BF16_Optimizer": ZeroOneInBf16,
    "DeepSpeedZeroOptimizer_Stage3": ZeroThree,
}
