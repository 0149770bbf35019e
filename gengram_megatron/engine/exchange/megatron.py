"""Reads Megatron-LM checkpoints as unsharded tensors with megatron-core's names.

There are two forms: one file per rank (`iter_0001000/mp_rank_00_001_003/model_optim_rng.pt`, see
megatron_ranks.py), and distributed checkpoints (`iter_0001000/.metadata`), in which layers and
experts may be stacked in one tensor; here each layer and expert has a tensor of its own.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from gengram_megatron.engine.checkpoint.stored import COMMON, METADATA, StoredTensors
from gengram_megatron.engine.exchange.megatron_ranks import (
    RANK_FILE,
    RankFiles,
    is_multi_token_prediction,
    plain_name,
)
from gengram_megatron.engine.exchange.untrusted import read_untrusted, values_of
from gengram_megatron.errors import UserError
from gengram_megatron.runs.store import check_readable

NEWEST = "latest_checkpointed_iteration.txt"
_STACKED = re.compile(r"decoder\.layers\.(?!\d)(.+)")
_STACKED_EXPERTS = re.compile(r"(.*\.mlp\.experts\.)experts\.(linear_fc[12]\.weight(?:_[wv])?)")
# If megatron-core stores each part of a weight under a separate name, it splits this one in two.
_FC1, _GATE, _UP = (f"linear_fc1.weight{end}" for end in ("", "_w", "_v"))


class MegatronTensors:
    """The tensors of one checkpoint, and the command-line arguments of the run that wrote it.

    names: the names of all tensors. read: returns one unsharded tensor. arguments: those with plain
    values (numbers, strings, booleans, None and lists of them); empty if the checkpoint has none.
    skipped: the names of tensors that are left out because our model has no such part.
    """

    def __init__(
        self,
        names: set[str],
        read: Callable[[str], Tensor],
        arguments: object = None,
        skipped: Iterable[str] = (),
    ):
        self.names, self.read, self.skipped = names, read, sorted(skipped)
        values = values_of(arguments)
        self.arguments = {name: value for name, value in values.items() if _is_plain(value)}


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def find_megatron(path: Path) -> Path | None:
    """Returns the folder of one iteration: `path` itself, or the newest iteration in it.

    Returns None if there is no checkpoint of Megatron-LM.
    """
    tracker = path / NEWEST
    if tracker.is_file():
        check_readable([tracker])
        text = tracker.read_text(errors="replace").strip()
        path = path / (f"iter_{int(text):07d}" if text.isdigit() else text)
    has_rank_files = any(path.glob(f"mp_rank_*/{RANK_FILE}"))
    return path if has_rank_files or (path / METADATA).is_file() else None


def open_megatron(folder: Path) -> MegatronTensors:
    """Opens the checkpoint in the folder of one iteration, as returned by find_megatron."""
    if (folder / METADATA).is_file():
        return _open_distributed(folder)
    files = RankFiles(folder)
    return _without_skipped(files.names, files.read, files.arguments)


def _without_skipped(
    names: Iterable[str], read: Callable[[str], Tensor], arguments: object
) -> MegatronTensors:
    """Returns the tensors without those of multi-token prediction, which our model lacks."""
    skipped = set(filter(is_multi_token_prediction, names))
    return MegatronTensors(set(names) - skipped, read, arguments, skipped)


def _open_distributed(folder: Path) -> MegatronTensors:
    stored = StoredTensors(folder)
    locations: dict[str, tuple[str, tuple[int, ...]]] = {}
    for key in stored.names:
        if name := plain_name(key):
            for single, index in _unstacked(name, stored.shape(key)):
                if plain := plain_name(single):
                    locations[plain] = key, index

    for gate in [name for name in locations if name.endswith(_GATE)]:
        if gate.replace(_GATE, _UP) not in locations:
            raise UserError(f"{folder} has {gate} and lacks its other half, {_UP}")

    def read_stored(name: str) -> Tensor:
        key, index = locations[name]
        return stored.read(key, *index)

    def read(name: str) -> Tensor:
        if name in locations:
            return read_stored(name)
        return torch.cat([read_stored(name.replace(_FC1, half)) for half in (_GATE, _UP)])

    names = {name.replace(_GATE, _FC1).replace(_UP, _FC1) for name in locations}
    common = folder / COMMON
    content = read_untrusted(common) if common.is_file() else None
    arguments = content.get("args") if isinstance(content, dict) else None
    return _without_skipped(names, read, arguments)


def _unstacked(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Returns the name of each layer's and expert's tensor in a stored one, and its index there."""
    layers: list[tuple[str, tuple[int, ...]]] = [(name, ())]
    if (stacked := _STACKED.fullmatch(name)) and shape:
        layers = [(f"decoder.layers.{layer}.{stacked[1]}", (layer,)) for layer in range(shape[0])]
    if not _STACKED_EXPERTS.fullmatch(name) or len(shape) < 3:
        return layers
    return [
        (_STACKED_EXPERTS.sub(rf"\g<1>local_experts.{expert}.\g<2>", name), (*index, expert))
        for name, index in layers
        for expert in range(shape[len(index)])
    ]
