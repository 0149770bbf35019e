"""The experts of a mixture-of-experts layer, computed as two grouped matrix products."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import CheckpointWithoutOutput
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from gengram_megatron.engine.model.initialize import InitMethod, mark, split_weight


class GroupedExperts(MegatronModule):
    """SwiGLU experts that use torch's grouped_mm, which needs neither Transformer Engine nor the
    grouped_gemm package and also runs on the CPU.

    Shapes on one rank, with e local experts and f = moe_ffn_hidden_size / expert_tensor:
    linear_fc1.weight [e, 2, f, h] (gate and up), linear_fc2.weight [e, h, f].
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
    ):
        super().__init__(config=config)
        self.ep_group, self.etp_group = pg_collection.ep, pg_collection.expt_tp
        self.expert_dp_group = pg_collection.expt_dp
        width = config.moe_ffn_hidden_size // self.etp_group.size()
        hidden = config.hidden_size
        # Whether experts are split differently from the rest of the model: then the ranks that hold
        # copies of them differ, too.
        expert_parallel = (
            self.ep_group.size() > 1 or self.etp_group.size() != pg_collection.tp.size()
        )
        self.linear_fc1 = _Weight(
            (num_local_experts, 2, width, hidden), 2, config.init_method, config, expert_parallel
        )
        self.linear_fc2 = _Weight(
            (num_local_experts, hidden, width),
            2,
            config.output_layer_init_method,
            config,
            expert_parallel,
        )
        self.recompute_activation = (
            config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules
        )

    def forward(
        self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor
    ) -> tuple[Tensor, None]:
        """Takes tokens [t, h] sorted by expert, tokens_per_expert [e] and probs [t]. Returns
        [t, h], and None for the bias.

        The router's probabilities multiply the activations before the second product, as in
        megatron-core's own experts.
        """
        ends = tokens_per_expert.to(tokens.device).cumsum(0).to(torch.int32)
        gate_up = _grouped_product(tokens, self.linear_fc1().flatten(1, 2), ends)
        if self.recompute_activation:
            checkpoint = CheckpointWithoutOutput()
            activated = checkpoint.checkpoint(_weighted_swiglu, gate_up, probs)
        else:
            activated = _weighted_swiglu(gate_up, probs)
        out = _grouped_product(activated, self.linear_fc2(), ends)
        if self.recompute_activation:
            checkpoint.discard_output_and_register_recompute(out)
        return out, None

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, ShardedTensor]:
        """Returns the sharded state. Experts are an axis of the global tensors, split over the
        expert-parallel group."""
        before = len(sharded_offsets)
        state = {}
        for name, weight in self.named_parameters():
            state[prefix + name] = ShardedTensor.from_rank_offsets(
                prefix + name,
                weight,
                *sharded_offsets,
                (before, self.ep_group.rank(), self.ep_group.size()),
                (before + 2, self.etp_group.rank(), self.etp_group.size()),
                replica_id=(0, 0, self.expert_dp_group.rank()),
                prepend_axis_num=before,
            )
        return state


class _Weight(nn.Module):
    """Holds one weight under the same name as a linear layer does. The weight is obtained by
    calling the module: with overlap_param_gather, that is when megatron-core waits for its
    all-gather."""

    def __init__(
        self,
        shape: tuple[int, ...],
        partition_dim: int,
        init_method: InitMethod,
        config: TransformerConfig,
        expert_parallel: bool,
    ):
        super().__init__()
        self.weight = split_weight(shape, partition_dim, config, init_method)
        # allreduce = False: megatron-core reduces the gradient over the expert-data-parallel group.
        mark(self.weight, allreduce=not expert_parallel)

    def forward(self) -> nn.Parameter:
        return self.weight


def _grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiplies each row of x [t, n] with its expert's matrix, x_i W_e^T; weight: [e, m, n]. The
    rows of expert e end at ends[e]. Returns [t, m]."""
    out = F.grouped_mm(x, weight.mT, offs=ends)
    if out.requires_grad:
        # The backward pass of grouped_mm rejects gradients whose rows are not contiguous. Flatten
        # and view, because torch calls an empty tensor contiguous whatever its strides.
        out.register_hook(lambda grad: grad.contiguous().flatten().view(grad.shape))
    return out


def _weighted_swiglu(gate_up: Tensor, probs: Tensor) -> Tensor:
    """Returns silu(gate) * up * p, [t, f] in gate_up's dtype. gate_up [t, 2 f], probs [t]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate) * up * probs.unsqueeze(-1)).to(gate_up.dtype)
