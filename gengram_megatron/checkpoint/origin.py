"""Whose weights a run takes over: another run's (checkpoint.load) or its own, of the same model."""

from pathlib import Path

from gengram_megatron.checkpoint.store import checkpoints_at
from gengram_megatron.config.schema import Config
from gengram_megatron.config.tables import LARGEST_DIRECT
from gengram_megatron.config.tree import flattened, inline_yaml
from gengram_megatron.errors import UserError

FREE = {
    "model.init_std",
    "model.moe_aux_loss_coeff",
    "model.moe_z_loss_coeff",
    "model.implementation",
    "model.gengram.init",
    "model.gengram.init_std",
    "model.gengram.split",
    "model.gengram.rows_over",
    "model.gengram.project",
}
"""Keys of the model that may change: they decide neither which weights there are nor what these
mean."""
ADDED = {"model.gengram.projection_bias": False}
"""Keys that older checkpoints lack, and what these were trained with. Of other keys that they lack,
any value fits."""
FREE_TO_A_NEW_RUN = {"model.seq_length", "model.rotary_base"}
"""And those that a run which begins with another's weights may have otherwise."""


def origins(config: Config) -> list[Path]:
    """The checkpoints that checkpoint.load means, in the order of their steps: the one that it
    names, or all of a run's folder."""
    given = Path(config.checkpoint.load)
    if found := checkpoints_at(given):
        return found
    raise UserError(
        f"checkpoint.load is {given}, which is neither a checkpoint nor the folder of a run that "
        "has one: give a folder such as runs/mine or runs/mine/checkpoints/step_00001000"
    )


def check_same_model(checkpoint: Path, stored: dict, config: Config, new_run: bool) -> None:
    """UserError: the checkpoint's `model` section describes another model than the config's.

    new_run: whether it is another run's, whose weights are loaded.
    """
    free = FREE | FREE_TO_A_NEW_RUN if new_run else FREE
    otherwise = "load another checkpoint" if new_run else "start in another run.dir"
    theirs = _settings(stored)
    for key, own in _settings(config.model.model_dump()).items():
        other = theirs.get(key, ADDED.get(key, own))
        if key not in free and other != own:
            raise UserError(
                f"{checkpoint} was trained with {key} = {inline_yaml(other)}, not "
                f"{inline_yaml(own)}: set {key} as it was, or {otherwise}"
            )


def _settings(model: dict) -> dict[str, object]:
    """All keys of a `model` section that are read, dotted."""
    model = {**model, "gengram": {**model["gengram"]}}
    gengram = model["gengram"]
    if not gengram["enabled"]:
        model["gengram"] = {"enabled": False}
    elif max(gengram["kmer_sizes"]) <= LARGEST_DIRECT:
        del gengram["hashing"]
    if model["attention"] != "mla":
        del model["mla"]
    return flattened({"model": model})
