"""DeepSpeed's ZeRO beneath megatron-core's model and schedule.

Forward passes go through DeepSpeed's engine, which takes each gradient as the backward pass makes
it, adds it up over microbatches in float32 and averages it over the data-parallel ranks. Adam, its
groups of parameters, schedule and clipping are the same as with megatron-core.

DeepSpeed is told of megatron-core's process groups for experts. It averages their gradients over
all data-parallel ranks, as megatron-core does, but adds them up over the ranks that hold the same
experts only, and shares their states among these.
"""

import importlib
import io
import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import _get_param_groups
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn

from gengram_megatron.config.schema import Config
from gengram_megatron.engine.checkpoint.restore import MOMENTS
from gengram_megatron.engine.model.initialize import sharded_parameters
from gengram_megatron.engine.training.engines.zero import KINDS
from gengram_megatron.engine.training.optimizer import adam_settings
from gengram_megatron.errors import UserError


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


def build(config: Config, models: list) -> tuple[list["ZeroChunk"], "ZeroOptimizer"]:
    """The engine of one rank. models: the one chunk of the model that a rank has without
    pipelines."""
    (model,) = models
    # Before ZeRO lays the weights out anew.
    pieces = [
        (piece.without_data(), parameter, start)
        for piece, parameter, start in sharded_parameters(model)
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
                f"DeepSpeed does not take this config ({reason}): change train.deepspeed.extra"
            ) from error
    return [ZeroChunk(engine, pieces)], ZeroOptimizer(engine)


class ZeroChunk(nn.Module):
    """What megatron-core's schedule runs as the model.

    pieces: what this rank has of each global tensor, as model.initialize.parts says, without data.
    With ZeRO 3 the model could no longer tell, as its weights are empty between uses.
    """

    def __init__(self, engine, pieces: list):
        super().__init__()
        self.module, self.config, self.pieces = engine.module, engine.module.config, pieces
        self._forward = engine.forward

    def forward(self, *args, **kwargs) -> Tensor:
        return self._forward(*args, **kwargs)

    def zero_grad_buffer(self) -> None:
        """Nothing is left of the last step: DeepSpeed clears gradients when it has used them."""


class ZeroOptimizer:
    """DeepSpeed's step, which asks before it changes a weight. engine: DeepSpeed's."""

    def __init__(self, engine):
        self.engine, self.zero = engine, KINDS[type(engine.optimizer).__name__](engine.optimizer)
        self.adam = engine.optimizer.optimizer
        # As torch's Adam makes them in its first step.
        for tensor in self.zero.flat:
            moments = {name: torch.zeros_like(tensor, requires_grad=False) for name in MOMENTS}
            self.adam.state[tensor] = {"step": torch.tensor(0.0), **moments}
        self.zero.link_states()

    @property
    def steps(self) -> int:
        """That Adam has done."""
        return int(self.adam.state[self.zero.flat[0]]["step"])

    @steps.setter
    def steps(self, steps: int) -> None:
        for tensor in self.zero.flat:
            self.adam.state[tensor]["step"].fill_(steps)

    @property
    def param_groups(self) -> list[dict]:
        """Adam's, of whose learning rate and weight decay the schedule has charge."""
        return self.adam.param_groups

    def zero_grad(self) -> None:
        self.engine.optimizer.zero_grad()

    def step_if(self, accept: Callable[[float], bool]) -> float:
        """A step, if `accept` agrees to the gradients' norm (before clipping), which is returned."""
        norm = math.nan

        def refused() -> bool:
            nonlocal norm
            found = float(self.zero.norm())
            norm = found if found >= 0 else math.nan
            return not accept(norm)

        self.zero.refuse_if(refused)
        self.engine.step()
        return norm

    def describe(self) -> str:
        """For people, read off what was built."""
        version = importlib.import_module("deepspeed").__version__
        stage = self.engine.zero_optimization_stage()
        adam = type(self.adam)
        moved = {
            "weights": self.engine.zero_offload_param(),
            "Adam": self.engine.zero_offload_optimizer(),
        }
        host = [what for what, settings in moved.items() if settings and settings.device == "cpu"]
        where = f", {' and '.join(host)} in host memory" if host else ""
        library = adam.__module__.split(".")[0]
        return f"DeepSpeed {version} ZeRO {stage} with {library} {adam.__name__}{where}"


class _Groups:
    """The process groups under the names by which DeepSpeed asks for them.

    Context-parallel ranks hold copies of the weights as data-parallel ones do.
    """

    @staticmethod
    def get_data_parallel_group() -> dist.ProcessGroup:
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

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


def _settings(config: Config) -> dict:
    """DeepSpeed's config: what our keys decide, on top of train.deepspeed.extra."""
    train, zero = config.train, config.train.deepspeed
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    ours = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        # The step decides when all microbatches are there; the schedule divides by their number.
        "managed_gradient_accumulation": False,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.clip_grad,
        "bf16": {"enabled": train.dtype == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # it is compiled when it is first used
        "zero_optimization": {
            "stage": zero.zero_stage,
            **({"offload_optimizer": host} if zero.offload_optimizer else {}),
            **({"offload_param": host} if zero.offload_parameters else {}),
        },
    }
    return _merged(zero.extra, ours)


def _merged(under: dict, over: dict) -> dict:
    """Both together; where both have a key that is no group, over's."""
    merged = {**under, **over}
    for key in under.keys() & over.keys():
        if isinstance(under[key], dict) and isinstance(over[key], dict):
            merged[key] = _merged(under[key], over[key])
    return merged


def _adam(config: Config, module: nn.Module) -> torch.optim.AdamW:
    """Over the same groups of parameters as megatron-core's."""
    settings, overrides = adam_settings(config)
    groups = [g for g in _get_param_groups([module], settings, overrides) if g["params"]]
    tell_of_experts(module, groups)
    return torch.optim.AdamW(
        groups,
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
    )


def _sum_over_tensor_parallel_ranks(model: nn.Module) -> None:
    """The gradients of weights that each tensor-parallel rank has used on its part of the sequence
    only, as megatron-core does after a step's last microbatch."""
    group = parallel_state.get_tensor_model_parallel_group()

    def add_up(gradient: Tensor) -> Tensor:
        total = gradient.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total.to(gradient.dtype)

    for parameter in model.parameters():
        if getattr(parameter, "sequence_parallel", False):
            parameter.register_hook(add_up)


def import_deepspeed():
    """DeepSpeed for this machine, without the groups of a run that this process has ended."""
    os.environ.setdefault("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    deepspeed = importlib.import_module("deepspeed")
    deepspeed.utils.groups._release_process_group_references()
    if not torch.cuda.is_available():
        # None of its own kernels, which it would compile when they are first used.
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    return deepspeed


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what DeepSpeed says of itself; errors stay."""
    with redirect_stdout(io.StringIO()):
        yield
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
