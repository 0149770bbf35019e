"""Which implementation stands for each part of a run, read off what was built."""

import torch
import torch.distributed as dist


def implementations(chunks: list, optimizer) -> str:
    """One line for people; a part that a rank does not have is left out."""
    found = {**parts(chunks, optimizer), "device": _device()}
    return "using " + ", ".join(f"{part}: {text}" for part, text in found.items() if text)


def parts(chunks: list, optimizer) -> dict[str, str | None]:
    """Read off the built model and optimizer, so that it cannot be wrong.

    chunks: this rank's wrapped model chunks; a rank without a layer has nothing to say of them.
    """
    names = {type(m).__name__: m for chunk in chunks for m in chunk.modules()}
    return {
        "attention": _first(names, "CoreAttention", "TEDotProductAttention"),
        "norm": _first(names, "RMSNorm", "TENorm", "TELayerNormColumnParallelLinear"),
        "memory": _memory(chunks),
        "experts": _first(names, "GroupedExperts", "TEGroupedMLP"),
        "optimizer": _optimizer(optimizer),
    }


_WORDS = {
    "CoreAttention": "torch scaled_dot_product_attention",
    "RMSNorm": "torch rms_norm",
    "GroupedExperts": "torch grouped_mm",
}


def _first(names: dict, *candidates: str) -> str | None:
    """The part that was built, in words; Transformer Engine's parts under their own names."""
    for name in candidates:
        if name in names:
            return _WORDS.get(name, f"Transformer Engine ({name})")
    return None


def _memory(chunks: list) -> str | None:
    # megatron-core may be imported only after platform.prepare.
    from gengram_megatron.model.gengram.memory import GengramMemory

    for module in (module for chunk in chunks for module in chunk.modules()):
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
