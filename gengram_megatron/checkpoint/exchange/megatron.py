"""Checkpoints of Megatron-LM, whole tensors by megatron-core's names, one layer a name.

Two forms: a file for each rank (`iter_0001000/mp_rank_00_001/model_optim_rng.pt`, tensor- and
pipeline-parallel), and distributed ones (`iter_0001000/.metadata`). Norms that Transformer Engine
joins with the linear map behind them, experts under several spellings and layers that are stacked
in one tensor all get the names of megatron-core's plain modules.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from gengram_megatron.checkpoint.access import check_readable
from gengram_megatron.checkpoint.exchange.untrusted import read_untrusted
from gengram_megatron.checkpoint.stored import COMMON, METADATA, StoredTensors
from gengram_megatron.errors import UserError

NEWEST = "latest_checkpointed_iteration.txt"
RANK_FILE = "model_optim_rng.pt"
_CHUNK = re.compile(r"model\d*")
_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_STACKED = re.compile(r"decoder\.layers\.(?!\d)(.+)")
_JOINED_EXPERTS = re.compile(r"(.*\.mlp\.experts\.)experts\.(linear_fc[12]\.weight)")

_SPELLINGS = (
    (r"self_attention\.linear_qkv\.layer_norm_weight$", "input_layernorm.weight"),
    (
        r"self_attention\.linear_kv_up_proj\.layer_norm_weight$",
        "self_attention.kv_layernorm.weight",
    ),
    (r"self_attention\.linear_q_up_proj\.layer_norm_weight$", "self_attention.q_layernorm.weight"),
    (r"mlp\.linear_fc1\.layer_norm_weight$", "pre_mlp_layernorm.weight"),
    (r"mlp\.experts\.(linear_fc[12])\.weight(\d+)$", r"mlp.experts.local_experts.\2.\1.weight"),
)

# The axis along which tensor-parallel ranks share a tensor; the others have it whole.
_BY_ROWS = re.compile(
    r"(word_embeddings|output_layer|linear_qkv|linear_q_proj|linear_q_up_proj|linear_kv_up_proj"
    r"|linear_fc1)\.weight$"
)
_BY_COLUMNS = re.compile(r"(linear_proj|linear_fc2)\.weight$")
_GATED = re.compile(r"linear_fc1\.weight$")


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
        # A StandIn, or the Namespace itself where megatron-core has told torch to let it through.
        found = getattr(arguments, "__dict__", {})
        self.arguments = {name: value for name, value in found.items() if _is_plain(value)}

    def argument(self, name: str):
        """As the run's command line had it; None where the checkpoint does not say."""
        return self.arguments.get(name)


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
    return _open_ranks(folder)


def _plain_name(name: str) -> str:
    for spelling, plain in _SPELLINGS:
        name = re.sub(spelling, plain, name)
    return name


def _open_distributed(folder: Path) -> MegatronTensors:
    stored = StoredTensors(folder)
    places: dict[str, tuple[str, tuple[int, ...]]] = {}
    for key in stored.names:
        if key.startswith(("optimizer.", "chained_")):
            continue
        for name, index in _unstacked(key, stored.shape(key)):
            places[_plain_name(name)] = key, index

    def read(name: str) -> Tensor:
        key, index = places[name]
        return stored.read(key, *index)

    common = folder / COMMON
    arguments = read_untrusted(common).get("args") if common.is_file() else None
    return MegatronTensors(set(places), read, arguments)


def _unstacked(key: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """The tensors that lie in a stored one, of layers and experts, and the index of each."""
    found: list[tuple[str, tuple[int, ...]]] = [(key, ())]
    if stacked := _STACKED.fullmatch(key):
        found = [(f"decoder.layers.{layer}.{stacked[1]}", (layer,)) for layer in range(shape[0])]
    if not _JOINED_EXPERTS.fullmatch(key):
        return found
    return [
        (_JOINED_EXPERTS.sub(rf"\g<1>local_experts.{expert}.\g<2>", name), (*index, expert))
        for name, index in found
        for expert in range(shape[len(index)])
    ]


def _open_ranks(folder: Path) -> MegatronTensors:
    files = {}
    for file in folder.glob(f"mp_rank_*/{RANK_FILE}"):
        rank = _RANK.fullmatch(file.parent.name)
        content = read_untrusted(file)
        arguments = content.get("args")
        if not rank or getattr(arguments, "expert_model_parallel_size", 1) > 1:
            raise UserError(
                f"{file.parent} is of a run with expert parallelism, and only tensor- and "
                "pipeline-parallel ranks are read: save it with --ckpt-format torch_dist"
            )
        files[int(rank[1]), int(rank[2] or 0)] = content
    tensors, pipeline = (1 + max(rank[axis] for rank in files) for axis in (0, 1))
    if missing := {(t, p) for t in range(tensors) for p in range(pipeline)} - files.keys():
        tensor, stage = min(missing)
        raise UserError(f"{folder} lacks the file of tensor rank {tensor}, pipeline rank {stage}")
    whole = [
        _numbered([files[tensor, stage] for stage in range(pipeline)]) for tensor in range(tensors)
    ]

    def read(name: str) -> Tensor:
        return _put_together(name, [rank[name] for rank in whole])

    return MegatronTensors(set(whole[0]), read, files[0, 0].get("args"))


def _numbered(stages: list[dict]) -> dict[str, Tensor]:
    """The tensors of all pipeline stages of one tensor-parallel rank, layers numbered through."""
    found, first = {}, 0
    # Each stage counts its layers from 0, and so does each of several chunks of it.
    chunks = {key for stage in stages for key in stage if _CHUNK.fullmatch(key)}
    chunks = sorted(chunks, key=lambda name: int(name.removeprefix("model") or 0))
    for model in (stage[chunk] for chunk in chunks for stage in stages):
        layers = 0
        for key, tensor in model.items():
            if not isinstance(tensor, Tensor) or key.endswith("_extra_state"):
                continue
            name = _plain_name(key)
            if layer := _LAYER.match(name):
                layers = max(layers, int(layer[1]) + 1)
                number = first + int(layer[1])
                name = f"decoder.layers.{number}.{name[layer.end() :]}"
            found[name] = tensor
        first += layers
    return found


def _put_together(name: str, parts: list[Tensor]) -> Tensor:
    """A whole tensor from those of the tensor-parallel ranks."""
    if _GATED.search(name):
        # Every rank has its share of the gate, then its share of the up-projection.
        gates, ups = zip(*(part.chunk(2) for part in parts))
        return torch.cat([*gates, *ups])
    if _BY_ROWS.search(name):
        return torch.cat(parts)
    if _BY_COLUMNS.search(name):
        return torch.cat(parts, dim=1)
    if not all(torch.equal(part, parts[0]) for part in parts[1:]):
        raise UserError(f"{name} differs between tensor-parallel ranks, which should hold copies")
    return parts[0]
