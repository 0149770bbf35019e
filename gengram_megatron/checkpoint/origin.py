"""The checkpoint of another run that a new run takes its weights from (checkpoint.load)."""

from collections.abc import Iterator
from pathlib import Path

from gengram_megatron.checkpoint.store import FACTS, CheckpointStore
from gengram_megatron.config.schema import Config
from gengram_megatron.config.tables import LARGEST_DIRECT
from gengram_megatron.errors import UserError

FREE = {
    "model.seq_length",
    "model.rotary_base",
    "model.init_std",
    "model.moe_aux_loss_coeff",
    "model.moe_z_loss_coeff",
    "model.implementation",
    "model.gengram.init_std",
    "model.gengram.split",
    "model.gengram.rows_over",
    "model.gengram.project",
}
"""Keys of the model in which the two runs may differ: they decide neither which weights there are
nor what these mean."""


def origins(config: Config) -> list[Path]:
    """The checkpoints that checkpoint.load means, in the order of their steps: the one that it
    names, or all of a run's folder."""
    given = Path(config.checkpoint.load)
    if (given / FACTS).is_file():
        return [given]
    for folder in (given / "checkpoints", given):
        if found := CheckpointStore(folder).checkpoints():
            return found
    raise UserError(
        f"checkpoint.load is {given}, which is neither a checkpoint nor the folder of a run that "
        "has one: give a folder such as runs/mine or runs/mine/checkpoints/step_00001000"
    )


def check_same_model(checkpoint: Path, stored: dict, config: Config) -> None:
    """UserError: the checkpoint's `model` section describes another model than the config's."""
    theirs = dict(_settings(stored))
    for key, own in _settings(config.model.model_dump()):
        other = theirs.get(key, own)  # one that the checkpoint does not know is new
        if key not in FREE and other != own:
            raise UserError(
                f"checkpoint.load: {checkpoint} was trained with {key} = {other}, not {own}: set "
                f"{key} as it was, or load another checkpoint"
            )


def _settings(model: dict) -> Iterator[tuple[str, object]]:
    """All keys of a `model` section that are read, dotted."""
    model = {**model, "gengram": {**model["gengram"]}}
    gengram = model["gengram"]
    if not gengram["enabled"]:
        model["gengram"] = {"enabled": False}
    elif max(gengram["kmer_sizes"]) <= LARGEST_DIRECT:
        del gengram["hashing"]
    if model["attention"] != "mla":
        del model["mla"]
    yield from _flat("model", model)


def _flat(prefix: str, section: dict) -> Iterator[tuple[str, object]]:
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}.{name}", value)
        else:
            yield f"{prefix}.{name}", value
