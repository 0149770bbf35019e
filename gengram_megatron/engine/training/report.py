"""What a run reports: which implementation computes each part, read from the built model, and its
use of the GPUs, as model FLOP utilisation and peak GPU memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer import TransformerConfig
from torch import nn

from gengram_megatron.config.schema import Config
from gengram_megatron.engine.model.data_parallel import gradient_fusion
from gengram_megatron.engine.model.gpt import MemoryModule
from gengram_megatron.engine.training.engines.deepspeed import ZeroOptimizer
from gengram_megatron.plan.time import PEAK_BF16_FLOPS, model_flops_utilisation, training_flops

OFF = "off"


def implementations(
    chunks: Sequence[nn.Module], optimizer: MegatronOptimizer | ZeroOptimizer
) -> str:
    """Returns one line for the user, without the parts that this rank does not have."""
    described = {**part_implementations(chunks, optimizer), "device": _device()}
    return "using " + ", ".join(f"{part}: {text}" for part, text in described.items() if text)


def part_implementations(
    chunks: Sequence[nn.Module], optimizer: MegatronOptimizer | ZeroOptimizer
) -> dict[str, str | None]:
    """Returns the implementation of each part, in words, read from the built model and optimizer.
    It is None for a part that this rank does not have, as it has no layer.

    chunks: this rank's wrapped model chunks.
    """
    modules = [module for chunk in chunks for module in chunk.modules()]
    names = {_name(module) for module in modules}
    return {
        "attention": _first(names, "TEDotProductAttention", "CoreAttention"),
        # A memory's norms are always torch's, whatever this says.
        "norm": _first(names, "TELayerNormColumnParallelLinear", "TERMSNorm", "RMSNorm"),
        "linear": _first(names, "TERowParallelLinear", "RowParallelLinear"),
        "memory": _memory(modules),
        "experts": _first(names, "TransformerEngineExperts", "GroupedExperts"),
        "optimizer": _optimizer(optimizer),
        "gradient accumulation fusion": gradient_fusion(modules) or OFF,
        "fp8": _fp8(chunks[0].config),
    }


_WORDS = {
    "CoreAttention": "torch scaled_dot_product_attention",
    "RMSNorm": "torch rms_norm",
    "RowParallelLinear": "torch matmul",
    "GroupedExperts": "torch grouped_mm",
    "TEDotProductAttention": "Transformer Engine (DotProductAttention)",
    "TELayerNormColumnParallelLinear": "Transformer Engine (LayerNormLinear)",
    "TERMSNorm": "Transformer Engine (RMSNorm)",
    "TERowParallelLinear": "Transformer Engine (Linear)",
    "TransformerEngineExperts": "Transformer Engine (GroupedLinear)",
}


def _name(module: nn.Module) -> str:
    """Returns the name of the module's class, with TE in front if Transformer Engine defines it:
    its RMSNorm has the same name as ours."""
    kind = type(module)
    from_engine = kind.__module__.startswith("transformer_engine.")
    return f"TE{kind.__name__}" if from_engine else kind.__name__


def _first(names: set[str], *candidates: str) -> str | None:
    """Returns the first candidate that was built, in words; None if none was."""
    return next((_WORDS[name] for name in candidates if name in names), None)


def _fp8(settings: TransformerConfig) -> str:
    """Returns the fp8 recipe and format. settings: megatron-core's config of the model."""
    return f"{settings.fp8_recipe}, {settings.fp8}" if settings.fp8 else OFF


def _memory(modules: list[nn.Module]) -> str | None:
    return next((module.describe() for module in modules if isinstance(module, MemoryModule)), None)


def _optimizer(optimizer: MegatronOptimizer | ZeroOptimizer) -> str:
    if isinstance(optimizer, ZeroOptimizer):
        return optimizer.describe()
    inner = (
        optimizer.chained_optimizers[0] if hasattr(optimizer, "chained_optimizers") else optimizer
    )
    adam = type(inner.optimizer)
    library = adam.__module__.split(".")[0]
    kind = "distributed " if type(inner).__name__ == "DistributedOptimizer" else ""
    return f"{kind}{library} {adam.__name__}"


def _device() -> str:
    processes = dist.get_world_size()
    if torch.cuda.is_available():
        return f"{processes} x {torch.cuda.get_device_name()}, nccl"
    return f"{processes} x CPU with {torch.get_num_threads()} threads, gloo"


@dataclass(frozen=True)
class GpuUse:
    """Measures how well each training step uses the GPUs. On CPUs nothing is measured.

    Attributes:
        device: the GPU's name, as the driver reports it; None on a CPU.
        devices: number of GPUs of the run.
        flops_per_token: FLOPs of the model's forward and backward passes.
    """

    device: str | None
    devices: int
    flops_per_token: int

    @classmethod
    def of_run(cls, config: Config, devices: int) -> "GpuUse":
        """Returns the GpuUse of a run on this number of devices, all like this process's device."""
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        return cls(name, devices, training_flops(config))

    def of_step(self, tokens_per_second: float) -> dict[str, float]:
        """Returns the numbers for the metrics; none on a CPU. All ranks call this.

        They are peak_memory_bytes, the most GPU memory that torch has had allocated at once since
        the start of this job, on the rank with the most, and model_flops_utilisation if known.
        """
        if self.device is None:
            return {}
        device = torch.cuda.current_device()
        peak = torch.tensor(torch.cuda.max_memory_allocated(), device=device)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        numbers: dict[str, float] = {"peak_memory_bytes": int(peak)}
        if (utilisation := self.utilisation(tokens_per_second)) is not None:
            numbers["model_flops_utilisation"] = utilisation
        return numbers

    def utilisation(self, tokens_per_second: float) -> float | None:
        """Returns the model FLOP utilisation (MFU): the fraction of all GPUs' peak that the model's
        arithmetic uses, from 0 to 1. It is None for a device that is not in PEAK_BF16_FLOPS.

        It is tokens_per_second x flops_per_token / (devices x peak). The peak is the dense bf16
        peak, whatever train.precision is. flops_per_token counts the matrix products that a token
        needs forward and backward, as `gengram plan` does: only the experts that the token is
        routed to, half of the square in causal attention, and for Gengram the projections of each
        token's features to key and value, also where the tables are projected instead. Activations
        recomputed in the backward pass do not count, nor do look-ups, norms and the optimizer.

        tokens_per_second: over all ranks, within a step, without validations and checkpoints.
        """
        if self.device not in PEAK_BF16_FLOPS:
            return None
        peak = PEAK_BF16_FLOPS[self.device]
        return model_flops_utilisation(tokens_per_second, self.flops_per_token, self.devices * peak)
