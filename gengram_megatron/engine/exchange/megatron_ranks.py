"""Checkpoints of Megatron-LM with a file for each rank, put together to whole tensors.

A folder is named for the numbers of its rank: `mp_rank_TT`, the tensor-parallel one, followed by
`_PPP` where the run was pipeline-parallel and by `_EEE` where it was expert-parallel. Each stage
counts its layers from 0, and each expert-parallel rank its experts. A weight that several ranks
have must be the same in all of them.

Norms that Transformer Engine joins with the linear map behind them, and experts under several
spellings, all get the names of megatron-core's plain modules.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gengram_megatron.engine.exchange.untrusted import read_untrusted, values_of
from gengram_megatron.errors import UserError

LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
EXPERT = re.compile(r"\.mlp\.experts\.local_experts\.(\d+)\.")

GROUPED = re.compile(r"\.mlp\.experts\.weight[12]$")

_WRAPPED = re.compile(r"(model\.)?(module\.)*")
_OF_NO_MODEL = re.compile(r"(optimizer|chained_\d+|opt_param_scheduler|rng_state|rerun_state)\b")
_SPELLINGS = (
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

# The axis along which tensor-parallel ranks share a tensor; the others have it whole.
_BY_ROWS = re.compile(
    r"(word_embeddings|output_layer|linear_qkv|linear_q_proj|linear_q_up_proj|linear_kv_up_proj"
    r"|linear_fc1)\.weight$"
)
_BY_COLUMNS = re.compile(r"(linear_proj|linear_fc2)\.weight$")
_GATED = re.compile(r"linear_fc1\.weight$")


def plain_name(name: str) -> str | None:
    """As megatron-core's plain modules have it; None for what is no weight of a model."""
    if _OF_NO_MODEL.match(name) or "._extra_state" in name:
        return None
    name = name[_WRAPPED.match(name).end() :]
    for spelling, plain in _SPELLINGS:
        name = re.sub(spelling, plain, name)
    return name


def is_of_several_tokens(name: str) -> bool:
    """Whether a weight is of the head that predicts several tokens, which this model lacks."""
    return name.startswith("mtp.")


def is_shared(name: str) -> bool:
    """Whether each tensor-parallel rank has a share of a weight, and not all of it."""
    return bool(_BY_ROWS.search(name) or _BY_COLUMNS.search(name))


def put_together(name: str, shares: list[Tensor]) -> Tensor:
    """A whole weight from the shares of the tensor-parallel ranks, in their order."""
    if _GATED.search(name):
        # Every rank has its share of the gate, then its share of the up-projection.
        gates, ups = zip(*(share.chunk(2) for share in shares))
        return torch.cat([*gates, *ups])
    return torch.cat(shares, dim=0 if _BY_ROWS.search(name) else 1)


def with_later_expert(name: str, first: int) -> str:
    """The name of an expert's weight, the expert's number counted from `first`."""
    return EXPERT.sub(lambda found: f".mlp.experts.local_experts.{int(found[1]) + first}.", name)


def experts_of_grouped(name: str, tensor: Tensor, experts: int) -> dict[str, Tensor]:
    """The weights of single experts in one of megatron-core's GroupedMLP.

    name: ends with mlp.experts.weight1 or weight2. tensor: [h, experts * width] or
    [experts * width, h], which the module views as [experts, h, width] and [experts, width, h]:
    of each expert a matrix with rows and columns changed. experts: how many it holds.
    """
    layer, _, number = name.rpartition("weight")
    if tensor.ndim != 2 or not experts or tensor.shape[number == "1"] % experts:
        raise UserError(f"{name} is {tuple(tensor.shape)}, which {experts} experts cannot share")
    shape = (experts, len(tensor), -1) if number == "1" else (experts, -1, tensor.shape[1])
    return {
        f"{layer}local_experts.{expert}.linear_fc{number}.weight": weight.t()
        for expert, weight in enumerate(tensor.reshape(shape))
    }


RANK_FILE = "model_optim_rng.pt"
_CHUNK = re.compile(r"model\d*")
_RANK = re.compile(r"mp_rank_(\d{2,})((?:_\d{3,}){0,2})")

Rank = tuple[int, int, int]
"""Tensor-, pipeline- and expert-parallel, each from 0."""


@dataclass(frozen=True)
class Sizes:
    """How many ranks shared the model. expert_tensor: how many shared each expert."""

    tensor: int
    pipeline: int
    expert: int
    expert_tensor: int


class RankFiles:
    """The weights of all ranks by plain names. arguments: those of the run, or None."""

    def __init__(self, folder: Path):
        self._folder = folder
        contents = {file.parent.name: _read(file) for file in folder.glob(f"mp_rank_*/{RANK_FILE}")}
        _check_same_iteration(folder, contents)
        self.arguments = contents[min(contents)].get("args")
        files = _by_rank(folder, contents, self.arguments)
        self._sizes = sizes = _sizes(files, self.arguments)
        _check_complete(folder, files, sizes)
        # Of each weight and tensor-parallel share all copies, and the folder of each.
        self._copies: dict[str, dict[int, list[tuple[str, Tensor]]]] = {}
        for tensor, expert in sorted({(tensor, expert) for tensor, _, expert in files}):
            stages = [files[tensor, stage, expert] for stage in range(sizes.pipeline)]
            for name, place, weight in _weights(stages, expert, sizes.expert):
                share = tensor % sizes.expert_tensor if EXPERT.search(name) else tensor
                shares = self._copies.setdefault(name, defaultdict(list))
                shares[share if is_shared(name) else 0].append((place, weight))

    @property
    def names(self) -> set[str]:
        return set(self._copies)

    def read(self, name: str) -> Tensor:
        """A whole weight. UserError: ranks that should have the same have another."""
        copies = self._copies[name]
        whole = [self._same(name, copies[share]) for share in sorted(copies)]
        if not is_shared(name):
            return whole[0]
        count = self._sizes.expert_tensor if EXPERT.search(name) else self._sizes.tensor
        if missing := set(range(count)) - copies.keys():
            raise UserError(f"{self._folder} lacks {name} of tensor rank {min(missing)}")
        try:
            return put_together(name, whole)
        except (RuntimeError, ValueError, IndexError):  # of shapes that cannot be put together
            shapes = ", ".join(str(tuple(share.shape)) for share in whole)
            raise UserError(
                f"{self._folder}: the shares of {name} do not fit together, they are {shapes}"
            ) from None

    def _same(self, name: str, copies: list[tuple[str, Tensor]]) -> Tensor:
        (first, weight), *others = copies
        for place, other in others:
            if weight.dtype != other.dtype or not torch.equal(weight, other):
                raise UserError(
                    f"{self._folder}: {name} differs between {first} and {place}, which should "
                    "hold copies of it: give a checkpoint that was saved in one go"
                )
        return weight


def _read(file: Path) -> dict:
    content = read_untrusted(file)
    if not isinstance(content, dict):
        content = {}
    models = [value for key, value in content.items() if _CHUNK.fullmatch(str(key))]
    if not models or not all(isinstance(model, dict) for model in models):
        raise UserError(f"{file} holds no model: give a folder that Megatron-LM saved")
    return content


def _check_same_iteration(folder: Path, contents: dict[str, dict]) -> None:
    first = min(contents)
    for name, content in sorted(contents.items()):
        if content.get("iteration") != contents[first].get("iteration"):
            raise UserError(
                f"{folder} holds iteration {contents[first].get('iteration')} in {first} and "
                f"{content.get('iteration')} in {name}: give a folder that was saved in one go"
            )


def _by_rank(folder: Path, contents: dict[str, dict], arguments) -> dict[Rank, tuple[str, dict]]:
    """The folder's name and its file's content, by rank."""
    pipeline, expert = (
        _size(arguments, f"{kind}_model_parallel") for kind in ("pipeline", "expert")
    )
    files: dict[Rank, tuple[str, dict]] = {}
    for name, content in sorted(contents.items()):
        rank = _RANK.fullmatch(name)
        if not rank:
            raise UserError(
                f"{folder / name} is not named as ranks are: mp_rank_00, mp_rank_00_000"
            )
        others = [int(number) for number in rank[2].split("_")[1:]]
        if len(others) == 1 and (expert or 1) > 1 and (pipeline or 1) == 1:
            others = [0, *others]
        tensor, stage, part = (int(rank[1]), *others, 0, 0)[:3]
        other, _ = files.setdefault((tensor, stage, part), (name, content))
        if other != name:
            raise UserError(
                f"{folder} has {other} and {name} for the same rank: remove what another run left"
            )
    return files


def _size(arguments, of: str) -> int | None:
    """How many ranks there were of a kind; None where the arguments do not say."""
    found = values_of(arguments).get(f"{of}_size")
    return found if isinstance(found, int) and found > 0 else None


def _sizes(files: dict[Rank, tuple[str, dict]], arguments) -> Sizes:
    """As the run's arguments have them; where they do not say, as the ranks that are there do."""
    tensor, pipeline, expert = (
        _size(arguments, f"{kind}_model_parallel") or 1 + max(rank[axis] for rank in files)
        for axis, kind in enumerate(("tensor", "pipeline", "expert"))
    )
    shared = _size(arguments, "expert_tensor_parallel") or tensor
    if tensor % shared:
        raise UserError(
            f"expert_tensor_parallel_size {shared} of the run does not divide its "
            f"tensor_model_parallel_size {tensor}, and then its files do not say which share of "
            "an expert they hold: save it with --ckpt-format torch_dist"
        )
    return Sizes(tensor, pipeline, expert, shared)


def _check_complete(folder: Path, files: dict[Rank, tuple[str, dict]], sizes: Sizes) -> None:
    """UserError: the file of a rank is missing, or one is there that no rank of the run wrote."""
    # Consecutive processes are tensor-parallel ranks; of them as many as share an expert are one
    # expert-parallel rank. So where fewer share an expert, not every pair of numbers occurs.
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
    if others := files.keys() - ranks:
        raise UserError(
            f"{folder / files[min(others)][0]} is of no rank of the run, whose tensor, pipeline and "
            f"expert sizes were {sizes.tensor}, {sizes.pipeline} and {sizes.expert}: remove what "
            "another run left"
        )


def _weights(
    stages: list[tuple[str, dict]], expert: int, ranks: int
) -> Iterator[tuple[str, str, Tensor]]:
    """Name, folder and tensor of each weight in the files of all stages, layers numbered through.

    expert: the expert-parallel rank that wrote the files, one of `ranks`.
    """
    first = 0
    # Each stage counts its layers from 0, and so does each of several chunks of it.
    chunks = {key for _, content in stages for key in content if _CHUNK.fullmatch(key)}
    for chunk in sorted(chunks, key=lambda name: int(name.removeprefix("model") or 0)):
        for place, content in stages:
            layers = 0
            for name, tensor in _of_chunk(place, content.get(chunk, {}), expert, ranks):
                if layer := LAYER.match(name):
                    layers = max(layers, int(layer[1]) + 1)
                    name = f"decoder.layers.{first + int(layer[1])}.{name[layer.end() :]}"
                yield name, place, tensor
            first += layers


def _of_chunk(place: str, model: dict, expert: int, ranks: int) -> Iterator[tuple[str, Tensor]]:
    """The weights of one part of a file, experts numbered through."""
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
            raise UserError(f"{place}/{RANK_FILE} holds {name} and lacks {router}")
        local = len(weights[router]) // ranks
        try:
            single = (
                experts_of_grouped(name, tensor, local) if GROUPED.search(name) else {name: tensor}
            )
        except UserError as error:
            raise UserError(f"{place}/{RANK_FILE}: {error}") from None
        for own, weight in single.items():
            yield with_later_expert(own, expert * local), weight
