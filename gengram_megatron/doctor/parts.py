"""Why each part of a model gets the implementation that it gets, and not a faster one."""

from gengram_megatron.config.keys import Keys
from gengram_megatron.config.projection import Projection
from gengram_megatron.config.schema import Config

TRANSFORMER_ENGINE = "transformer_engine"
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
        "experts": layers,
        "memory": projection and projection.reason,
        "optimizer": _optimizer(config, gpus, extensions["Adam"]["found"]),
        "gradient accumulation fusion": _fusion(extensions["gradient accumulation fusion"]),
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


def _fusion(looked: dict) -> str:
    off = "gengram does not switch it on, as it has not been tested with apex"
    if looked["found"] is None:
        return f"megatron-core did not find apex's fused_weight_gradient_mlp_cuda; besides, {off}"
    return f"megatron-core found {looked['found']}, but {off}"


def _fp8(config: Config) -> str:
    allowed = Keys(Config).allowed(("train", "precision"))
    return f"train.precision is {config.train.precision}, and must be {allowed}"
