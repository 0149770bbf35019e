"""Counts of parameters and FLOPs against built models, the published sizes and torch's counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gengram_megatron.config.layout import with_gengram
from gengram_megatron.config.schema import Config
from gengram_megatron.config.weights import count_parameters
from gengram_megatron.plan.time import (
    PEAK_BF16_FLOPS,
    forward_flops,
    model_flops_utilisation,
    training_flops,
)
from tests.plan.configs import load

MODEL = {
    "hidden_size": 32,
    "num_layers": 3,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 40,
    "num_experts": 4,
    "seq_length": 64,
    "vocab_size": 32,
}
LATENT = {"kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 6, "v_head_dim": 10}
KINDS = {
    "gqa": {},
    "mha": {"attention": "mha", "num_query_groups": None},
    "mla": {"attention": "mla", "num_query_groups": None, "mla": LATENT},
    "mla with low-rank queries": {
        "attention": "mla",
        "num_query_groups": None,
        "mla": {**LATENT, "q_lora_rank": 24},
    },
}
FEED_FORWARDS = {
    "moe": {},
    "three of four experts": {"moe_router_topk": 3},
    "dense": {"num_experts": None},
}
MEMORIES = {
    "no memory": {},
    "memory": {"gengram": {"enabled": True, "layers": [1, 3], "dim": 8}},
    "other sizes": {
        "gengram": {
            "enabled": True,
            "layers": [2],
            "kmer_sizes": [2, 4],
            "dim": 4,
            "conv_kernel": 3,
        }
    },
    "a norm for its output": {
        "gengram": {"enabled": True, "layers": [2], "dim": 8, "output": "norm"}
    },
    "plain output": {"gengram": {"enabled": True, "layers": [2], "dim": 8, "output": "plain"}},
    "a bias for key and value": {
        "gengram": {"enabled": True, "layers": [1, 3], "dim": 8, "projection_bias": True}
    },
}
PARTS = {**KINDS, **FEED_FORWARDS, **MEMORIES, "mla, dense": KINDS["mla"] | FEED_FORWARDS["dense"]}
"""Each kind of part with the default of the others: counts of parts add up."""


def make_config(**model) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": "unused"},
            "model": {**MODEL, **model},
            "data": {"path": "unused"},
            "train": {"global_batch_size": 1, "steps": 1, "precision": "fp32"},
        }
    )


def build(config: Config, layout):
    from gengram_megatron.engine.model.build import build_model

    return build_model(config, with_gengram(layout, config))[0]


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_parameters_are_those_of_a_built_model(one_process, part):
    config = make_config(**part)
    sizes = {name: p.numel() for name, p in build(config, one_process).named_parameters()}
    counted, model = count_parameters(config), config.model
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    idle = experts * (1 - model.moe_router_topk / (model.num_experts or model.moe_router_topk))
    assert counted.total == sum(sizes.values())
    assert counted.activated == counted.total - idle
    assert counted.gengram == sum(size for name, size in sizes.items() if ".memory." in name)
    assert counted.tables == sum(size for name, size in sizes.items() if ".tables." in name)


def test_tables_of_the_paper():
    config = load("ablation_50b_8k/layer_sets/layers_3_6_10")
    assert count_parameters(config).tables == 59_996_160


def counted_by_torch(config: Config, layout) -> dict[str, int]:
    """FLOPs of a forward pass over one sequence, by the name of the operator."""
    model, device = build(config, layout), torch.cuda.current_device()
    tokens = torch.full((1, config.model.seq_length), 8, device=device)
    # The kernel with the products written out: torch does not count all of the fused ones.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens)
    return {str(operator): n for operator, n in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_flops_are_those_that_torch_counts(one_process, part):
    """Where the two mean the same. torch counts the whole square of causal attention, twice of
    ours, and does not know the grouped products, which are those of the experts."""
    config = make_config(**part)
    torchs, ours = counted_by_torch(config, one_process), forward_flops(config)
    single = (
        ours.total - ours.attention_scores - (ours.feed_forward if config.model.num_experts else 0)
    )
    assert torchs["aten.mm"] == config.model.seq_length * single
    assert torchs["aten.bmm"] == config.model.seq_length * 2 * ours.attention_scores


def test_experts_cost_what_a_dense_layer_as_wide_as_the_chosen_ones_costs():
    moe, dense = make_config(), make_config(num_experts=None, ffn_hidden_size=2 * 40)
    assert forward_flops(moe).feed_forward == forward_flops(dense).feed_forward


def test_utilisation():
    config = load("ablation_50b_8k/baseline")
    # Six FLOPs a token for each activated weight of a matrix, and three times the causal scores.
    weights = count_parameters(config).activated - 256 * 1024 - (2 * 12 + 1) * 1024
    assert training_flops(config) == 6 * weights + 3 * 12 * 8192 * 2 * 1024
    half = PEAK_BF16_FLOPS["NVIDIA H200"] / 2 / training_flops(config)
    assert model_flops_utilisation(half, training_flops(config), 989e12) == pytest.approx(0.5)
