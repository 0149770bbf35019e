"""Reads Megatron-LM checkpoints with one file per rank and merges their shards.

A folder is named after its ranks: `mp_rank_TT`, the tensor-parallel rank, followed by `_PPP` if the
run was pipeline-parallel and by `_EEE` if it was expert-parallel. Each pipeline stage numbers its
layers from 0, and each expert-parallel rank its experts. A weight that several ranks hold must be
identical in all of them.

Norms that Transformer Engine fuses with the linear layer after them, and experts, which are named
in several ways, all get the names of megatron-core's local modules.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gengram_megatron.engine.exchange.untrusted import read_untrusted, values_of
from gengram_megatron.errors import UserError

LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
EXPERT = re.compile(r"\.mlp\.experts\.local_experts\.(\d+)\.")

GROUPED = re.compile(r"\.mlp\.experts\.weight[12]$")

_WRAPPED = re.compile(r"(model\.)?(module\.)*")
_NOT_A_WEIGHT = re.compile(r"(optimizer|chained_\d+|opt_param_scheduler|rng_state|rerun_state)\b")
_RENAMES = (
    (r"self_attention\.linear_qkv\.layer_norm_weight$", "input_layernorm.weight"),
    (
        r"self_attention\.linear_kv_up_proj\.layer_norm_weight$",
        "self_attention.kv_layernorm.weight",
    ),
    (r"self_attention\.linear_q_up_proj\.layer_norm_weight$", "self_attention.q_layernorm.weight"),
    (r"mlp\.linear_fc1\.layer_norm_weight$", "pre_mlp_layernorm.weight"),
    (r"mlp\.experts\.(linear_fc[12])\.weight(\d+)$", r"mlp.experts.local_experts.\2.\1.weight"),
    (r"mlp\.experts\.experts\.(\d+)\.", r"mlp.experts.local_experts.\1."),
)

# How tensor-parallel ranks split a weight; all weights that match neither are replicated.
_SPLIT_BY_ROWS = re.compile(
    r"(word_embeddings|output_layer|linear_qkv|linear_q_proj|linear_q_up_proj|linear_kv_up_proj"
    r"|linear_fc1)\.weight$"
)
_SPLIT_BY_COLUMNS = re.compile(r"(linear_proj|linear_fc2)\.weight$")
_GATED = re.compile(r"linear_fc1\.weight$")


def plain_name(name: str) -> str | None:
    """Returns the name as in megatron-core's local modules; None if it is not a model weight."""
    if _NOT_A_WEIGHT.match(name) or "._extra_state" in name:
        return None
    name = _WRAPPED.sub("", name, count=1)
    for pattern, plain in _RENAMES:
        name = re.sub(pattern, plain, name)
    return name


def is_multi_token_prediction(name: str) -> bool:
    """Returns whether a weight belongs to multi-token prediction, which our model lacks."""
    return name.startswith("mtp.")


def is_sharded(name: str) -> bool:
    """Returns whether each tensor-parallel rank holds a shard of a weight instead of all of it."""
    return bool(_SPLIT_BY_ROWS.search(name) or _SPLIT_BY_COLUMNS.search(name))


def merge_shards(name: str, shards: list[Tensor]) -> Tensor:
    """Returns the unsharded weight from its shards, in the order of the tensor-parallel ranks."""
    if _GATED.search(name):
        # A shard holds rows of the gate projection, followed by rows of the up-projection.
        gates, ups = zip(*(shard.chunk(2) for shard in shards))
        return torch.cat([*gates, *ups])
    return torch.cat(shards, dim=0 if _SPLIT_BY_ROWS.search(name) else 1)


def with_expert_offset(name: str, offset: int) -> str:
    """Returns the name of an expert's weight with `offset` added to the expert's index."""
    return EXPERT.sub(lambda match: f".mlp.experts.local_experts.{int(match[1]) + offset}.", name)


def split_grouped_experts(name: str, tensor: Tensor, experts: int) -> dict[str, Tensor]:
    """Returns the weight of each expert, by name, from a weight of megatron-core's GroupedMLP.

    name: ends with mlp.experts.weight1 or weight2. tensor: [h, experts * width] or
    [experts * width, h], which the module views as [experts, h, width] and [experts, width, h]:
    the transposed matrix of each expert. experts: how many experts it holds.

    Raises UserError if the tensor cannot be divided among so many experts.
    """
    prefix, _, number = name.rpartition("weight")
    if tensor.ndim != 2 or not experts or tensor.shape[number == "1"] % experts:
        raise UserError(
            f"{name} is {tuple(tensor.shape)}, which cannot be divided among {experts} experts"
        )
    shape = (experts, len(tensor), -1) if number == "1" else (experts, -1, tensor.shape[1])
    return {
        f"{prefix}local_experts.{expert}.linear_fc{number}.weight": weight.t()
        for expert, weight in enumerate(tensor.reshape(shape))
    }


RANK_FILE = "model_optim_rng.pt"
_CHUNK = re.compile(r"model\d*")
_RANK = re.compile(r"mp_rank_(\d{2,})((?:_\d{3,}){0,2})")

Rank = tuple[int, int, int]
"""The tensor-, pipeline- and expert-parallel ranks, each from 0."""
RankFile = tuple[str, dict[str, Any]]
"""The name of a rank's folder, and the content of its file."""


@dataclass(frozen=True)
class ParallelSizes:
    """The parallel sizes of a run.

    expert_tensor: how many tensor-parallel ranks split each expert.
    """

    tensor: int
    pipeline: int
    expert: int
    expert_tensor: int


class RankFiles:
    """The weights of all ranks, by plain names.

    arguments: the command-line arguments of the run, or None.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        contents = {file.parent.name: _read(file) for file in folder.glob(f"mp_rank_*/{RANK_FILE}")}
        _check_same_iteration(folder, contents)
        self.arguments: object = contents[min(contents)].get("args")
        files = _by_rank(folder, contents, self.arguments)
        self._sizes = sizes = _parallel_sizes(files, self.arguments)
        _check_complete(folder, files, sizes)
        # By weight name and shard index: all copies, each with the name of its folder.
        self._copies: dict[str, dict[int, list[tuple[str, Tensor]]]] = {}
        for tensor, expert in sorted({(tensor, expert) for tensor, _, expert in files}):
            stages = [files[tensor, stage, expert] for stage in range(sizes.pipeline)]
            for name, folder_name, weight in _weights(stages, expert, sizes.expert):
                shard = tensor % sizes.expert_tensor if EXPERT.search(name) else tensor
                copies = self._copies.setdefault(name, defaultdict(list))
                copies[shard if is_sharded(name) else 0].append((folder_name, weight))

    @property
    def names(self) -> set[str]:
        """The plain names of all weights."""
        return set(self._copies)

    def read(self, name: str) -> Tensor:
        """Returns an unsharded weight.

        Raises UserError if ranks hold different copies, or if shards are missing or do not fit.
        """
        copies = self._copies[name]
        shards = [self._checked(name, copies[index]) for index in sorted(copies)]
        if not is_sharded(name):
            return shards[0]
        count = self._sizes.expert_tensor if EXPERT.search(name) else self._sizes.tensor
        if missing := set(range(count)) - copies.keys():
            raise UserError(f"{self._folder} lacks {name} of tensor rank {min(missing)}")
        try:
            return merge_shards(name, shards)
        except (RuntimeError, ValueError, IndexError):  # for shapes that do not fit
            shapes = ", ".join(str(tuple(shard.shape)) for shard in shards)
            raise UserError(
                f"{self._folder}: the shards of {name} do not fit together: their shapes are "
                f"{shapes}"
            ) from None

    def _checked(self, name: str, copies: list[tuple[str, Tensor]]) -> Tensor:
        """Returns the first copy; raises UserError if another one differs from it."""
        (first_folder, weight), *rest = copies
        for folder_name, copy in rest:
            if weight.dtype != copy.dtype or not torch.equal(weight, copy):
                raise UserError(
                    f"{self._folder}: {name} differs between {first_folder} and {folder_name}, "
                    "which should hold copies of it: give a checkpoint that was saved in one go"
                )
        return weight


def _read(file: Path) -> dict[str, Any]:
    """Returns the content of a rank's file, which must hold a model."""
    stored = read_untrusted(file)
    content = {str(k): value for k, value in stored.items()} if isinstance(stored, dict) else {}
    models = [value for key, value in content.items() if _CHUNK.fullmatch(key)]
    if not models or not all(isinstance(model, dict) for model in models):
        raise UserError(f"{file} holds no model: give a folder that was saved by Megatron-LM")
    return content


def _check_same_iteration(folder: Path, contents: dict[str, dict[str, Any]]) -> None:
    """Raises UserError if the files are of different iterations."""
    first = min(contents)
    for name, content in sorted(contents.items()):
        if content.get("iteration") != contents[first].get("iteration"):
            raise UserError(
                f"{folder} holds iteration {contents[first].get('iteration')} in {first} and "
                f"{content.get('iteration')} in {name}: give a folder that was saved in one go"
            )


def _by_rank(
    folder: Path, contents: dict[str, dict[str, Any]], arguments: object
) -> dict[Rank, RankFile]:
    """Returns the folder's name and its file's content for each rank."""
    pipeline, expert = (
        _size(arguments, f"{kind}_model_parallel") for kind in ("pipeline", "expert")
    )
    files: dict[Rank, RankFile] = {}
    for name, content in sorted(contents.items()):
        rank = _RANK.fullmatch(name)
        if not rank:
            raise UserError(
                f"{folder / name} is not named like the folder of a rank, such as mp_rank_00 or "
                "mp_rank_00_000"
            )
        numbers = [int(number) for number in rank[2].split("_")[1:]]
        if len(numbers) == 1 and (expert or 1) > 1 and (pipeline or 1) == 1:
            numbers = [0, *numbers]  # the one number is the expert-parallel rank
        tensor, stage, expert_rank = (int(rank[1]), *numbers, 0, 0)[:3]
        first_name, _ = files.setdefault((tensor, stage, expert_rank), (name, content))
        if first_name != name:
            raise UserError(
                f"{folder} has {first_name} and {name} for the same rank: remove the one left by "
                "another run"
            )
    return files


def _size(arguments: object, kind: str) -> int | None:
    """Returns the parallel size of a kind; None if the arguments do not give it."""
    size = values_of(arguments).get(f"{kind}_size")
    return size if isinstance(size, int) and size > 0 else None


def _parallel_sizes(files: dict[Rank, RankFile], arguments: object) -> ParallelSizes:
    """Returns the sizes from the run's arguments, or else from the ranks in the folder."""
    tensor, pipeline, expert = (
        _size(arguments, f"{kind}_model_parallel") or 1 + max(rank[axis] for rank in files)
        for axis, kind in enumerate(("tensor", "pipeline", "expert"))
    )
    expert_tensor = _size(arguments, "expert_tensor_parallel") or tensor
    if tensor % expert_tensor:
        raise UserError(
            f"expert_tensor_parallel_size {expert_tensor} of the run does not divide its "
            f"tensor_model_parallel_size {tensor}, so its files do not tell which shard of an "
            "expert they hold: save the checkpoint with --ckpt-format torch_dist"
        )
    return ParallelSizes(tensor, pipeline, expert, expert_tensor)


def _check_complete(folder: Path, files: dict[Rank, RankFile], sizes: ParallelSizes) -> None:
    """Raises UserError if a rank's file is missing, or if a file belongs to no rank of the run."""
    # Consecutive processes are tensor-parallel ranks, and each group of `expert_tensor` of them is
    # one expert-parallel rank. If expert_tensor < tensor, not every pair of ranks occurs.
    pairs = {
        (process % sizes.tensor, process // sizes.expert_tensor % sizes.expert)
        for process in range(max(sizes.tensor, sizes.expert_tensor * sizes.expert))
    }
    ranks = {(tensor, stage, expert) for tensor, expert in pairs for stage in range(sizes.pipeline)}
    if missing := ranks - files.keys():
        tensor, stage, expert = min(missing)
        raise UserError(
            f"{folder} lacks the file of tensor rank {tensor}, pipeline rank {stage}, expert rank "
            f"{expert}: give the folder with the files of all ranks"
        )
    if unexpected := files.keys() - ranks:
        raise UserError(
            f"{folder / files[min(unexpected)][0]} belongs to no rank of the run, whose tensor, "
            f"pipeline and expert sizes were {sizes.tensor}, {sizes.pipeline} and {sizes.expert}: "
            "remove it if another run left it"
        )


def _weights(stages: list[RankFile], expert: int, ranks: int) -> Iterator[tuple[str, str, Tensor]]:
    """Yields name, folder and tensor of each weight in the files of all pipeline stages.

    Layers are numbered over all stages, and experts over all expert-parallel ranks.
    expert: the expert-parallel rank that wrote the files. ranks: the number of such ranks.
    """
    first_layer = 0
    # Each stage numbers its layers from 0, and so does each virtual-pipeline chunk of a stage.
    chunks = {key for _, content in stages for key in content if _CHUNK.fullmatch(key)}
    for chunk in sorted(chunks, key=lambda name: int(name.removeprefix("model") or 0)):
        for folder_name, content in stages:
            layers = 0
            for name, tensor in _chunk_weights(folder_name, content.get(chunk, {}), expert, ranks):
                if layer := LAYER.match(name):
                    layers = max(layers, int(layer[1]) + 1)
                    name = f"decoder.layers.{first_layer + int(layer[1])}.{name[layer.end() :]}"
                yield name, folder_name, tensor
            first_layer += layers


def _chunk_weights(
    folder_name: str, model: dict[str, Any], expert: int, ranks: int
) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights of one model chunk in a file, experts numbered over all ranks."""
    weights = {
        name: tensor
        for key, tensor in model.items()
        if isinstance(tensor, Tensor) and (name := plain_name(str(key)))
    }
    for name, tensor in weights.items():
        if ".mlp.experts." not in name:
            yield name, tensor
            continue
        router = f"{name.partition('.mlp.experts.')[0]}.mlp.router.weight"
        if router not in weights:
            raise UserError(f"{folder_name}/{RANK_FILE} holds {name} and lacks {router}")
        local_experts = len(weights[router]) // ranks
        try:
            single = (
                split_grouped_experts(name, tensor, local_experts)
                if GROUPED.search(name)
                else {name: tensor}
            )
        except UserError as error:
            raise UserError(f"{folder_name}/{RANK_FILE}: {error}") from None
        for local_name, weight in single.items():
            yield with_expert_offset(local_name, expert * local_experts), weight
