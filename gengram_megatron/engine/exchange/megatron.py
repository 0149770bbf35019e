"""Checkpoints of Megatron-LM, whole tensors by megatron-core's names, one layer a name.

Two forms: a file for each rank (`iter_0001000/mp_rank_00_001_003/model_optim_rng.pt`, see
megatron_ranks.py), and distributed ones (`iter_0001000/.metadata`), in which layers and experts may
be stacked in one tensor.
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
    is_of_several_tokens,
    plain_name,
)
from gengram_megatron.engine.exchange.untrusted import read_untrusted, values_of
from gengram_megatron.errors import UserError
from gengram_megatron.runs.store import check_readable

NEWEST = "latest_checkpointed_iteration.txt"
_STACKED = re.compile(r"decoder\.layers\.(?!\d)(.+)")
_JOINED_EXPERTS = re.compile(r"(.*\.mlp\.experts\.)experts\.(linear_fc[12]\.weight(?:_[wv])?)")
# Where megatron-core keeps each part of a weight under a name of its own, it cuts this one in two.
_WHOLE, _GATE, _UP = (f"linear_fc1.weight{end}" for end in ("", "_w", "_v"))


class MegatronTensors:
    """The tensors of one checkpoint, and the command line of the run that wrote it.

    names: what is there. read: one whole tensor. arguments: all plain values of the command line
    (numbers, strings, booleans, None and lists of them); empty where the checkpoint has none.
    skipped: tensors that were left out, as this model has no such part.
    """

    def __init__(
        self,
        names: set[str],
        read: Callable[[str], Tensor],
        arguments: object = None,
        skipped: Iterable[str] = (),
    ):
        self.names, self.read, self.skipped = names, read, sorted(skipped)
        found = values_of(arguments)
        self.arguments = {name: value for name, value in found.items() if _is_plain(value)}


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def find_megatron(path: Path) -> Path | None:
    """The folder of one iteration that `path` means: itself, or the newest in it."""
    newest = path / NEWEST
    if newest.is_file():
        check_readable([newest])
        text = newest.read_text(errors="replace").strip()
        path = path / (f"iter_{int(text):07d}" if text.isdigit() else text)
    ranks = any(path.glob(f"mp_rank_*/{RANK_FILE}"))
    return path if ranks or (path / METADATA).is_file() else None


def open_megatron(folder: Path) -> MegatronTensors:
    """folder: of one iteration, as find_megatron gives it."""
    if (folder / METADATA).is_file():
        return _open_distributed(folder)
    files = RankFiles(folder)
    return _without_skipped(files.names, files.read, files.arguments)


def _without_skipped(
    names: Iterable[str], read: Callable[[str], Tensor], arguments: object
) -> MegatronTensors:
    skipped = set(filter(is_of_several_tokens, names))
    return MegatronTensors(set(names) - skipped, read, arguments, skipped)


def _open_distributed(folder: Path) -> MegatronTensors:
    stored = StoredTensors(folder)
    places: dict[str, tuple[str, tuple[int, ...]]] = {}
    for key in stored.names:
        if name := plain_name(key):
            for single, index in _unstacked(name, stored.shape(key)):
                places[plain_name(single)] = key, index

    for gate in [name for name in places if name.endswith(_GATE)]:
        if gate.replace(_GATE, _UP) not in places:
            raise UserError(f"{folder} has {gate} and lacks the other half of it, {_UP}")

    def stored_at(name: str) -> Tensor:
        key, index = places[name]
        return stored.read(key, *index)

    def read(name: str) -> Tensor:
        if name in places:
            return stored_at(name)
        return torch.cat([stored_at(name.replace(_WHOLE, half)) for half in (_GATE, _UP)])

    names = {name.replace(_GATE, _WHOLE).replace(_UP, _WHOLE) for name in places}
    common = folder / COMMON
    arguments = read_untrusted(common).get("args") if common.is_file() else None
    return _without_skipped(names, read, arguments)


def _unstacked(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """The tensors that lie in a stored one, of layers and experts, and the index of each."""
    found: list[tuple[str, tuple[int, ...]]] = [(name, ())]
    if (stacked := _STACKED.fullmatch(name)) and shape:
        found = [(f"decoder.layers.{layer}.{stacked[1]}", (layer,)) for layer in range(shape[0])]
    if not _JOINED_EXPERTS.fullmatch(name) or len(shape) < 3:
        return found
    return [
        (_JOINED_EXPERTS.sub(rf"\g<1>local_experts.{expert}.\g<2>", name), (*index, expert))
        for name, index in found
        for expert in range(shape[len(index)])
    ]
