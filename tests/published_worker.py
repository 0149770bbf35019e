"""One rank of those that save a published model together, with megatron-core's own writer.

Every rank gets the weights of the whole model from a file and takes its shares of them.
"""

import pickle
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from gengram_megatron.config.layout import Layout, world_size_from_environment
from gengram_megatron.engine.processes import start_processes
from tests.exchange_models import load
from tests.published_model import grouped, published_model, save_distributed, share


def save(
    folder: Path,
    words: tuple[str, ...],
    sizes: tuple[int, int, int],
    metadata: dict,
    with_grouped: bool = False,
) -> None:
    """folder: has the weights as whole.pt and gets the checkpoint. sizes: tensor-, pipeline- and
    expert-parallel. metadata: for megatron-core, how to write. with_grouped: experts of its
    GroupedMLP."""
    world, rank = world_size_from_environment()
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    layout = layout_of(world, *sizes)
    start_processes(layout, 1, rank)
    own = folder / f"of_rank_{rank}"  # ranks must not write one file at a time
    own.mkdir()
    config = load(own, "run", *words)
    gpt = published_model(config, layout)
    whole = torch.load(folder / "whole.pt")
    fill(gpt, whole, sizes)
    if with_grouped:
        group_experts(gpt)
    save_distributed(gpt, config, folder, metadata, besides_the_model(whole))
    if rank == 0:
        describe_as_mcore_metadata(folder / "iter_0000100")


def layout_of(world: int, tensor: int, pipeline: int, expert: int) -> Layout:
    """As many ranks share an expert as share the rest."""
    return Layout(
        world_size=world,
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=None,
        context=1,
        expert=expert,
        expert_tensor=tensor,
        sequence=False,
        data=world // tensor // pipeline,
        expert_data=world // tensor // pipeline // expert,
        num_microbatches=1,
        steps=1,
        samples=1,
    )


@torch.no_grad()
def fill(gpt, whole: dict[str, Tensor], sizes: tuple[int, int, int]) -> None:
    """The weights of a rank's model, from those of the whole model by name."""
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    expert = parallel_state.get_expert_model_parallel_rank()
    layers = [layer.layer_number - 1 for layer in gpt.decoder.layers]
    for name, weight in gpt.named_parameters():
        words = name.split(".")
        if name.startswith("decoder.layers."):
            words[2] = str(layers[int(words[2])])
        if "local_experts" in words:
            place = words.index("local_experts") + 1
            local = len(gpt.decoder.layers[0].mlp.experts.local_experts)
            words[place] = str(expert * local + int(words[place]))
        weight.copy_(share(name, whole[".".join(words)], rank, sizes[0]))


def group_experts(gpt) -> None:
    """megatron-core's GroupedMLP in place of its SequentialMLP. Its kernels are not needed here."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe import grouped_gemm_util
    from megatron.core.transformer.moe.experts import GroupedMLP

    groups = ProcessGroupCollection.use_mpu_process_groups()
    for layer in gpt.decoder.layers:
        single = layer.mlp.experts.local_experts
        with mock.patch.object(grouped_gemm_util, "assert_grouped_gemm_is_available"):
            layer.mlp.experts = GroupedMLP(len(single), layer.config, groups)
        for name, first in (("weight1", True), ("weight2", False)):
            part = "linear_fc1" if first else "linear_fc2"
            weights = [getattr(expert, part).weight.detach() for expert in single]
            found = getattr(layer.mlp.experts, name)
            assert found.shape == grouped(weights, first).shape
            found.data = grouped(weights, first)


def besides_the_model(whole: dict[str, Tensor]) -> dict:
    """What a checkpoint of a run holds more: optimizer, random states, states of fp8, the head for
    several tokens."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    rank, world = dist.get_rank(), dist.get_world_size()
    norm, state = whole["decoder.final_layernorm.weight"], {}
    for key in (
        "optimizer.state.exp_avg.decoder.final_layernorm.weight",
        "chained_0.optimizer.state.fp32_param.decoder.final_layernorm.weight",
        "mtp.layers.0.enorm.weight",
        "decoder.final_layernorm._extra_state",
    ):
        state[key] = ShardedTensor.from_rank_offsets(key, norm, replica_id=rank)
    for key in (
        "rng_state",
        "rerun_state_machine_state",
    ):
        state[key] = ShardedObject(key, {"state": rank}, (world,), (rank,))
    return {"others": state}


def describe_as_mcore_metadata(iteration: Path) -> None:
    """As megatron-core 0.15 writes it: with classes of its own for the whole and for each plan."""
    from megatron.core.dist_checkpointing.strategies import torch as strategies

    class MCoreMetadata(Metadata):
        __module__, __qualname__ = strategies.__name__, "MCoreMetadata"

    class MCoreSavePlan(SavePlan):
        __module__, __qualname__ = strategies.__name__, "MCoreSavePlan"

    file = iteration / ".metadata"
    described = vars(pickle.loads(file.read_bytes()))
    changed = MCoreMetadata(described["state_dict_metadata"])
    plans = []
    for found in described.pop("all_local_plans"):
        plans.append(MCoreSavePlan(found.items))
        plans[-1].__dict__.update(vars(found), mcore_data={})
    notes = {"nd_reformulated_orig_global_shape": torch.Size([4, 2])}
    changed.__dict__.update(described, all_local_plans=plans, mcore_data={"optimizer.a": notes})
    with mock.patch.multiple(strategies, MCoreMetadata=MCoreMetadata, MCoreSavePlan=MCoreSavePlan):
        file.write_bytes(pickle.dumps(changed))
