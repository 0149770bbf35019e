"""Why each part of a model gets the implementation that it gets, and not a faster one."""

from gengram_megatron.config.problems.transformer_engine import TRANSFORMER_ENGINE
from gengram_megatron.config.projection import Projection
from gengram_megatron.config.schema import Config

WITHOUT = {
    "experts": "model.num_experts is null: a dense model",
    "memory": "model.gengram.enabled is false",
}
"""Why a model may lack a part."""


def explained(
    uses: dict[str, str | None],
    config: Config,
    projection: Projection | None,
    gpus: list,
    software: dict,
    extensions: dict,
) -> dict[str, dict]:
    """uses: what was built; each part's value here says that, and why."""
    layers = _layers(config, gpus, software)
    why = {
        "attention": layers,
        "norm": layers + _norm(extensions["layer norm"]),
        "linear": layers,
        "experts": layers,
        "memory": projection and projection.reason,
        "optimizer": _optimizer(config, gpus, extensions["Adam"]["found"]),
        "gradient accumulation fusion": _fusion(
            gpus, config, extensions["gradient accumulation fusion"]["found"]
        ),
        "fp8": _fp8(config),
    }
    return {
        part: {"uses": text or "none", "why": why[part] if text else WITHOUT[part]}
        for part, text in uses.items()
    }


def _layers(config: Config, gpus: list, software: dict) -> str:
    chosen, found = config.model.implementation, software["transformer-engine"]
    asked = f"model.implementation is {chosen}"
    if chosen == TRANSFORMER_ENGINE:
        return asked
    if found["error"]:
        return f"{asked}; Transformer Engine cannot be imported: {found['error']}"
    if not gpus:
        return f"{asked}; Transformer Engine needs a GPU, and torch sees none"
    if found["version"] is None:
        return f"{asked}; Transformer Engine is not installed"
    return f"{asked}; Transformer Engine is used only where {TRANSFORMER_ENGINE} is asked for"


def _norm(looked: dict) -> str:
    if looked["found"] is None:
        return ""
    return f"; the fused norm of {looked['found']} is not used: it is no RMSNorm"


def _optimizer(config: Config, gpus: list, found: str) -> str:
    if config.train.engine == "deepspeed":
        return "train.engine is deepspeed, which shares what torch's Adam works on"
    if found != "torch":
        return f"megatron-core takes the fused Adam of {found} where it is installed"
    missing = "megatron-core found no fused Adam, of Transformer Engine or apex"
    return missing if gpus else f"{missing}; both need a GPU"


def _fusion(gpus: list, config: Config, apex: str | None) -> str:
    if not gpus:
        return "apex and Transformer Engine add up gradients inside matrix products, on GPUs"
    found = f"megatron-core found apex's {apex}" if apex else "megatron-core found none of apex"
    if config.model.implementation == TRANSFORMER_ENGINE:
        return f"{found}; Transformer Engine's layers have their own"
    return found


def _fp8(config: Config) -> str:
    return f"train.precision is {config.train.precision}"
