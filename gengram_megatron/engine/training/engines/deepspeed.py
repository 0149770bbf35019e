"""DeepSpeed's ZeRO with megatron-core's model and schedule.

Forward passes go through DeepSpeed's engine, which receives each gradient as the backward pass
computes it, accumulates it over microbatches in float32 and averages it over the data-parallel
ranks. Adam, its parameter groups, the schedule and clipping are the same as with megatron-core.

DeepSpeed gets megatron-core's process groups for experts. It divides the experts' gradients by the
number of all data-parallel ranks, as megatron-core does, but sums them only over the ranks that
hold the same experts, and shards their optimizer states among these ranks.
"""

import importlib
import io
import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer import _get_param_groups
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn

from gengram_megatron.config.schema import Config
from gengram_megatron.engine.checkpoint.restore import MOMENTS
from gengram_megatron.engine.model.gpt import GengramGPT
from gengram_megatron.engine.model.initialize import sharded_parameters
from gengram_megatron.engine.training.engines.zero import KINDS
from gengram_megatron.engine.training.optimizer import adam_settings
from gengram_megatron.errors import UserError


def mark_experts(module: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Marks the experts for DeepSpeed, if they are distributed over the ranks differently from the
    rest of the model. groups: megatron-core's parameter groups; each holds only such experts, or
    none of them."""
    expert_groups = [group for group in groups if group["is_expert_parallel"]]
    if not expert_groups:
        return
    name = f"ep_size_{parallel_state.get_expert_model_parallel_world_size()}"  # DeepSpeed's form
    for group in expert_groups:
        group.update(moe=True, name=name)
        for weight in group["params"]:
            weight.group_name = name
    module.add_module("experts_of_deepspeed", _marker(name))


def _marker(name: str) -> nn.Module:
    """Returns a module without weights that is never run. DeepSpeed looks for a module of this
    class to find out that there are experts, and calls it to set up their process groups under a
    name."""
    base: Any = importlib.import_module("deepspeed.moe.layer").MoE

    class Marker(base):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = None  # DeepSpeed's own checkpoint code reads it

        def set_deepspeed_parallelism(self, *_: Any) -> None:
            groups = importlib.import_module("deepspeed.utils.groups")
            same_experts = parallel_state.get_expert_data_parallel_group()
            # Squared gradients are summed over this group, so it must cover all parts of the
            # experts.
            all_experts = parallel_state.get_expert_tensor_and_model_parallel_group()
            groups._EXPERT_DATA_PARALLEL_GROUP[name] = same_experts
            groups._EXPERT_PARALLEL_GROUP[name] = all_experts

    return Marker()


def build(config: Config, models: list[GengramGPT]) -> tuple[list["ZeroChunk"], "ZeroOptimizer"]:
    """Builds the engine of one rank. models: one model chunk, as there are no pipeline stages."""
    (model,) = models
    # Before ZeRO rearranges the weights.
    shards = [
        (shard.without_data(), parameter, start)
        for shard, parameter, start in sharded_parameters(model)
    ]
    _sum_over_tensor_parallel_ranks(model)
    module = Float16Module(model.config, model) if config.train.dtype == "bf16" else model
    with _quiet():
        deepspeed = import_deepspeed()
        try:
            engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=_adam(config, module),
                config=_settings(config),
                mpu=_Groups,
            )
        except (AssertionError, TypeError, ValueError) as error:
            if not config.train.deepspeed.extra:
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"DeepSpeed does not accept this config ({reason}): change train.deepspeed.extra"
            ) from error
    return [ZeroChunk(engine, shards)], ZeroOptimizer(engine)


class ZeroChunk(nn.Module):
    """The model as megatron-core's schedule runs it.

    shards: this rank's shard of each global tensor, as model.initialize.sharded_parameters yields
    it, without data. With ZeRO 3 the model cannot tell later, as its weights are empty between
    uses.
    """

    def __init__(self, engine: Any, shards: list[tuple[ShardedTensor, nn.Parameter, int]]):
        super().__init__()
        self.module, self.config, self.shards = engine.module, engine.module.config, shards
        self._forward: Callable[..., Tensor] = engine.forward

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the forward pass through DeepSpeed's engine."""
        return self._forward(*args, **kwargs)

    def zero_grad_buffer(self) -> None:
        """Does nothing: DeepSpeed clears gradients when it has used them."""


class ZeroOptimizer:
    """DeepSpeed's optimizer, with a step that asks before it changes a weight.

    engine: DeepSpeed's engine.
    """

    def __init__(self, engine: Any):
        self.engine, self.zero = engine, KINDS[type(engine.optimizer).__name__](engine.optimizer)
        self.adam: torch.optim.Optimizer = engine.optimizer.optimizer
        # The states that torch's Adam creates in its first step.
        for tensor in self.zero.flat:
            moments = {name: torch.zeros_like(tensor, requires_grad=False) for name in MOMENTS}
            self.adam.state[tensor] = {"step": torch.tensor(0.0), **moments}
        self.zero.link_states()

    @property
    def steps(self) -> int:
        """The number of steps that Adam has done."""
        return int(self.adam.state[self.zero.flat[0]]["step"])

    @steps.setter
    def steps(self, steps: int) -> None:
        for tensor in self.zero.flat:
            self.adam.state[tensor]["step"].fill_(steps)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Adam's parameter groups; the schedule sets their learning rates and weight decays."""
        return self.adam.param_groups

    def zero_grad(self) -> None:
        """Clears the gradients of all weights."""
        self.engine.optimizer.zero_grad()

    def step_if(self, accept: Callable[[float], bool]) -> float:
        """Does a step if `accept` returns True for the gradient norm (before clipping). Returns the
        norm."""
        norm = math.nan

        def rejected() -> bool:
            nonlocal norm
            computed = self.zero.norm()
            norm = computed if computed >= 0 else math.nan
            return not accept(norm)

        self.zero.skip_step_if(rejected)
        self.engine.step()
        return norm

    def describe(self) -> str:
        """Describes the optimizer for the user, as it was built."""
        version = importlib.import_module("deepspeed").__version__
        stage = self.engine.zero_optimization_stage()
        adam = type(self.adam)
        offload = {
            "weights": self.engine.zero_offload_param(),
            "Adam": self.engine.zero_offload_optimizer(),
        }
        host = [what for what, settings in offload.items() if settings and settings.device == "cpu"]
        offloaded = f", {' and '.join(host)} in host memory" if host else ""
        library = adam.__module__.split(".")[0]
        return f"DeepSpeed {version} ZeRO {stage} with {library} {adam.__name__}{offloaded}"


class _Groups:
    """The process groups, by the names that DeepSpeed uses for them.

    Context-parallel ranks hold copies of the weights, as data-parallel ranks do.
    """

    @staticmethod
    def get_data_parallel_group() -> dist.ProcessGroup:
        group: dist.ProcessGroup
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        return group

    @staticmethod
    def get_data_parallel_world_size() -> int:
        return _Groups.get_data_parallel_group().size()

    @staticmethod
    def get_data_parallel_rank() -> int:
        return _Groups.get_data_parallel_group().rank()

    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_model_parallel_world_size = staticmethod(
        parallel_state.get_tensor_model_parallel_world_size
    )
    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)


def _settings(config: Config) -> dict[str, Any]:
    """Returns DeepSpeed's config: train.deepspeed.extra, overridden by what our own keys decide."""
    train, zero = config.train, config.train.deepspeed
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    ours = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        # step_if is called after the last microbatch; the schedule divides by their number.
        "managed_gradient_accumulation": False,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.clip_grad,
        "bf16": {"enabled": train.dtype == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # that optimizer is compiled on first use
        "zero_optimization": {
            "stage": zero.zero_stage,
            **({"offload_optimizer": host} if zero.offload_optimizer else {}),
            **({"offload_param": host} if zero.offload_parameters else {}),
        },
    }
    return _merged(zero.extra, ours)


def _merged(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Merges two nested dicts; where both have a value for a key, `overrides` wins."""
    merged = {**base, **overrides}
    for key in base.keys() & overrides.keys():
        if isinstance(base[key], dict) and isinstance(overrides[key], dict):
            merged[key] = _merged(base[key], overrides[key])
    return merged


def _adam(config: Config, module: nn.Module) -> torch.optim.AdamW:
    """Returns AdamW over the same parameter groups as megatron-core's Adam."""
    settings, overrides = adam_settings(config)
    groups = [g for g in _get_param_groups([module], settings, overrides) if g["params"]]
    mark_experts(module, groups)
    return torch.optim.AdamW(
        groups,
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
    )


def _sum_over_tensor_parallel_ranks(model: nn.Module) -> None:
    """Sums over the tensor-parallel ranks the gradients of weights that each of these ranks has
    used only on its part of the sequence; megatron-core does so after a step's last microbatch."""
    group = parallel_state.get_tensor_model_parallel_group()

    def all_reduced(gradient: Tensor) -> Tensor:
        total = gradient.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total.to(gradient.dtype)

    for parameter in model.parameters():
        if getattr(parameter, "sequence_parallel", False):
            parameter.register_hook(all_reduced)


def import_deepspeed() -> ModuleType:
    """Imports DeepSpeed, set up for this machine's accelerator, and drops process groups that an
    earlier run of this process left behind. Returns the module."""
    os.environ.setdefault("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    deepspeed = importlib.import_module("deepspeed")
    deepspeed.utils.groups._release_process_group_references()
    if not torch.cuda.is_available():
        # Use none of DeepSpeed's own kernels: it would compile them on first use.
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    return deepspeed


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses DeepSpeed's output, except for errors."""
    with redirect_stdout(io.StringIO()):
        yield
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
