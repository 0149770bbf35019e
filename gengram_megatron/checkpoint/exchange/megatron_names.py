"""The names that Megatron-LM gives to the weights of a model, and how its ranks share each weight.

Norms that Transformer Engine joins with the linear map behind them, and experts under several
spellings, all get the names of megatron-core's plain modules.
"""

import re

import torch
from torch import Tensor

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
