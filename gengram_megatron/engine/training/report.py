"""What a run says of itself: which implementation computes each part, read off what was built, and
its use of the GPUs, as model FLOP utilisation and peak memory."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from gengram_megatron.config.schema import Config
from gengram_megatron.engine.model.data_parallel import fused_by
from gengram_megatron.engine.model.memory import MemoryModule
from gengram_megatron.plan.flops import PEAK_BF16_FLOPS, model_flops_utilisation, training_flops

OFF = "off"


def implementations(chunks: list, optimizer) -> str:
    """One line for people; a part that a rank does not have is left out."""
    found = {**parts(chunks, optimizer), "device": _device()}
    return "using " + ", ".join(f"{part}: {text}" for part, text in found.items() if text)


def parts(chunks: list, optimizer) -> dict[str, str | None]:
    """Read off the built model and optimizer, so that it cannot be wrong.

    chunks: this rank's wrapped model chunks; a rank without a layer has nothing to say of them.
    """
    modules = [module for chunk in chunks for module in chunk.modules()]
    names = {_name(module) for module in modules}
    return {
        "attention": _first(names, "TEDotProductAttention", "CoreAttention"),
        # The memory's norms are torch's in any case.
        "norm": _first(names, "TELayerNormColumnParallelLinear", "TERMSNorm", "RMSNorm"),
        "linear": _first(names, "TERowParallelLinear", "RowParallelLinear"),
        "memory": _memory(modules),
        "experts": _first(names, "TransformerEngineExperts", "GroupedExperts"),
        "optimizer": _optimizer(optimizer),
        "gradient accumulation fusion": fused_by(modules) or OFF,
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
    """Of its class; in front of it TE where it is Transformer Engine's own, which calls its norm
    as we call ours."""
    kind = type(module)
    own = kind.__module__.startswith("transformer_engine.")
    return f"TE{kind.__name__}" if own else kind.__name__


def _first(names: set[str], *candidates: str) -> str | None:
    """The part that was built, in words."""
    return next((_WORDS[name] for name in candidates if name in names), None)


def _fp8(settings) -> str:
    """settings: megatron-core's config of the model."""
    return f"{settings.fp8_recipe}, {settings.fp8}" if settings.fp8 else OFF


def _memory(modules: list[nn.Module]) -> str | None:
    return next((one.describe() for one in modules if isinstance(one, MemoryModule)), None)


def _optimizer(optimizer) -> str:
    if hasattr(optimizer, "describe"):  # another engine's
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
