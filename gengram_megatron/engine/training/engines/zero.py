"""DeepSpeed's (0.19.8) three ZeRO optimizers under one face: what a step needs to know of them and
they do not tell in the same way."""

import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor


class ZeroOneAndTwo:
    """DeepSpeedZeroOptimizer.

    flat: this rank's parts of the weights in float32, which Adam works on: one tensor for each
    group of parameters, or more.
    """

    def __init__(self, zero):
        self.zero, self.flat = zero, zero.single_partition_of_fp32_groups

    def link_states(self) -> None:
        """Have it find each weight's part of Adam's states. By itself it looks for them when the
        first of several groups has made a step, and finds none in the others."""
        self.zero._lazy_init_hp_params_optimizer_state()

    def norm(self) -> Tensor:
        """Of the gradients of all ranks; negative if it is not finite."""
        return self.zero.scaled_global_norm()

    def refuse_if(self, refused: Callable[[], bool]) -> None:
        """Have the next step ask whether it is refused, and then be left out, as one whose gradients
        overflowed."""

        def check(**_) -> None:
            self.zero.overflow = refused()

        self.zero.check_grad_overflow, self.zero.check_overflow = True, check


class ZeroOneInBf16(ZeroOneAndTwo):
    """BF16_Optimizer, which leaves out a step whose gradients have no finite norm."""

    def __init__(self, zero):
        self.zero, self.flat = zero, zero.fp32_groups_flat_partition
        self._gradients = zero.get_grads_for_norm

    def norm(self) -> float:
        gradients, of_experts = self._gradients()
        mpu, utils = self.zero.mpu, _utils()
        norm = utils.get_global_norm_of_tensors(gradients, mpu=mpu)
        return utils.get_norm_with_moe_layers(norm, mpu=mpu, expert_tensors=of_experts)

    def refuse_if(self, refused: Callable[[], bool]) -> None:
        def gradients(for_clipping: bool = False):
            if not for_clipping and refused():
                return [torch.tensor(math.nan, device=torch.cuda.current_device())], {}
            return self._gradients(for_clipping)

        self.zero.get_grads_for_norm = gradients


class ZeroThree(ZeroOneAndTwo):
    """DeepSpeedZeroOptimizer_Stage3."""

    def __init__(self, zero):
        self.zero, self.flat = zero, zero.fp32_partitioned_groups_flat

    def link_states(self) -> None:
        """It looks them up each time."""

    def norm(self) -> Tensor:
        return _utils().combine_grad_norm_groups(self.zero._get_norm_groups())

    def refuse_if(self, refused: Callable[[], bool]) -> None:
        def check(**_) -> None:
            self.zero.overflow = refused()

        self.zero._overflow_check_and_loss_scale_update = check


def _utils():
    return importlib.import_module("deepspeed.runtime.utils")


KINDS = {
    "DeepSpeedZeroOptimizer": ZeroOneAndTwo,
    "BF16_Optimizer": ZeroOneInBf16,
    "DeepSpeedZeroOptimizer_Stage3": ZeroThree,
}
