"""Which implementation stands for each part of a run, read off what was built."""

import torch
import torch.distributed as dist
from torch import nn

OFF = "off"


def implementations(chunks: list, optimizer) -> str:
    """One line for people; a part that a rank does not have is left out."""
    found = {**parts(chunks, optimizer), "device": _device()}
    return "using " + ", ".join(f"{part}: {text}" for part, text in found.items() if text)


def parts(chunks: list, optimizer) -> dict[str, str | None]:
    """Read off the built model and optimizer, so that it cannot be wrong.

    chunks: this rank's wrapped model chunks; a rank without a layer has nothing to say of them.
    """
    # megatron-core may be imported only after platform.prepare.
    from gengram_megatron.model.accumulation import fused_by

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
    from gengram_megatron.model.gengram.memory import GengramMemory

    for module in modules:
        if isinstance(module, GengramMemory):
            return "Gengram, " + (
                "features projected" if module.projected is None else "tables projected once a step"
            )
    return None


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
