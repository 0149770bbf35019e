"""ZeRO over expert-parallel ranks: DeepSpeed is told of megatron-core's process groups.

It averages gradients of experts over all data-parallel ranks, as megatron-core does, but adds them
up over the ranks that hold the same experts only, and shares their states among these.
"""

import importlib

from megatron.core import parallel_state
from torch import nn


def tell_of_experts(module: nn.Module, groups: list[dict]) -> None:
    """Mark the experts, if they lie otherwise on the ranks than the rest of the model. groups: the
    optimizer's, of megatron-core; each holds such experts alone or none of them."""
    of_experts = [group for group in groups if group["is_expert_parallel"]]
    if not of_experts:
        return
    name = f"ep_size_{parallel_state.get_expert_model_parallel_world_size()}"  # DeepSpeed's form
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
            same_experts = parallel_state.get_expert_data_parallel_group()
            # Over which the squares of gradients are added up, so it must hold all parts of them.
            all_experts = parallel_state.get_expert_tensor_and_model_parallel_group()
            groups._EXPERT_DATA_PARALLEL_GROUP[name] = same_experts
            groups._EXPERT_PARALLEL_GROUP[name] = all_experts

    return Marker()
