"""DeepSpeed's ZeRO over expert-parallel ranks: it is told of megatron-core's process groups.

It averages gradients of experts over all data-parallel ranks, as megatron-core does, but adds them
up over the ranks that hold the same experts only, and shares their states among these.
"""

import importlib

from megatron.core import parallel_state
from torch import nn


def tell_of_experts(module: nn.Module, groups: list[dict]) -> None:
    """Mark what expert-parallel ranks share, if they do. groups: the optimizer's, of megatron-core;
    each holds experts alone or none."""
    of_experts = [group for group in groups if group["is_expert_parallel"]]
    if not of_experts:
        return
    ranks = parallel_state.get_expert_model_parallel_world_size()
    name = f"ep_size_{ranks}"  # from which DeepSpeed reads the number
    for group in of_experts:
        group.update(moe=True, name=name)
        for weight in group["params"]:
            weight.group_name = name
    module.add_module("experts_of_deepspeed", _marker(name))


def _marker(name: str) -> nn.Module:
    """A module without weights that is never run: DeepSpeed looks for one of this class to learn
    that there are experts, and lets it set up their process groups under a name."""

    class Marker(importlib.import_module("deepspeed.moe.layer").MoE):
        def __init__(self):
            nn.Module.__init__(self)
            self.num_experts = None  # asked for by DeepSpeed's own checkpoints

        def set_deepspeed_parallelism(self, *_) -> None:
            groups = importlib.import_module("deepspeed.utils.groups")
            groups._EXPERT_PARALLEL_GROUP[name] = parallel_state.get_expert_model_parallel_group()
            groups._EXPERT_DATA_PARALLEL_GROUP[name] = (
                parallel_state.get_expert_data_parallel_group()
            )
            groups.expert_tensor_parallel_world_size = (
                parallel_state.get_expert_tensor_parallel_world_size()
            )

    return Marker()
