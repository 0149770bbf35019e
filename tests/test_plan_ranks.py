"""Weights that a plan gives to each rank, against the true model built as that rank."""

from collections import Counter

import pytest

from gengram_megatron.config.layout import check_layout
from gengram_megatron.config.weights import count_parameters
from gengram_megatron.plan.stages import ShardedModel
from tests.plan.configs import load
from tests.plan.ranks import as_rank, build_shapes

FORMAL = "pretrain_200b_8k/gengram_window_21"
LATENT = "ablation_50b_8k/architecture/dense_mla_gengram"
HASHED = "model.gengram={kmer_sizes: [1, 6, 12], hashing: {rows: 16777216}}"
ROWS = "model.gengram.split=rows"
NO_PIPELINE = "parallel.pipeline=1"

#   name: (config, processes, words)
CASES = {
    "published": (FORMAL, 4, []),
    "genos_10b": (FORMAL, 16, ["parallel={tensor: 2, pipeline: 2, expert: 2, context: 2}"]),
    "tensor": (FORMAL, 4, [NO_PIPELINE, "parallel.tensor=4"]),
    "experts_not_cut": (
        FORMAL,
        8,
        ["parallel={tensor: 2, pipeline: 2, expert: 4, expert_tensor: 1}"],
    ),
    "experts_cut_further": (FORMAL, 4, [NO_PIPELINE, "parallel.expert_tensor=2"]),
    "interleaved": (FORMAL, 4, ["parallel.virtual_pipeline=3"]),
    "uneven": (FORMAL, 3, ["parallel={pipeline: 3, first_stage_layers: 3, last_stage_layers: 5}"]),
    "uneven_interleaved": (
        FORMAL,
        4,
        ["parallel={pipeline: 4, virtual_pipeline: 2, last_stage_layers: 6}"],
    ),
    "rows_over_data": (FORMAL, 8, [ROWS]),
    "rows_over_tensor": (
        FORMAL,
        8,
        [ROWS, "model.gengram.rows_over=tensor", "parallel.tensor=4"],
    ),
    "rows_over_experts": (
        FORMAL,
        8,
        [ROWS, "model.gengram.rows_over=expert", "parallel.expert=2"],
    ),
    "hashed": (FORMAL, 6, [HASHED]),
    "latent": (LATENT, 4, ["parallel={tensor: 2, pipeline: 2}"]),
    "latent_queries": (LATENT, 4, ["parallel.tensor=4", "model.mla.q_lora_rank=384"]),
    "norm_output": (LATENT, 2, ["parallel.pipeline=2", "model.gengram.output=norm"]),
    "load_balance": ("ablation_50b_8k/load_balance/experts_128_gengram", 8, []),
}


def kind_of(name: str, weight) -> str:
    if getattr(weight, "rows_over", None):
        return "rows"
    return "experts" if ".experts." in name else "copied"


def built(split: ShardedModel, rank: int) -> tuple[int, Counter]:
    """A rank's stage, and the weights that it builds by kind."""
    from megatron.core import parallel_state

    layout, found = split.layout, Counter(copied=0, experts=0, rows=0)
    with as_rank(layout, rank):
        for chunk in build_shapes(split.config, layout):
            for name, weight in chunk.named_parameters():
                found[kind_of(name, weight)] += weight.numel()
        return parallel_state.get_pipeline_model_parallel_rank(), found


@pytest.mark.parametrize("case", CASES)
def test_every_rank_holds_what_the_plan_says(case):
    """Of rows, which do not divide, the rank with most; the others have a row a table less."""
    name, processes, words = CASES[case]
    config = load(name, *words, "train.global_batch_size=48")
    split = ShardedModel(config, check_layout(config, processes))
    found = [built(split, rank) for rank in range(processes)]
    for stage in range(split.layout.pipeline):
        ranks = [counts for own, counts in found if own == stage]
        held = split.rank_parameters(stage)
        assert {counts["experts"] for counts in ranks} == {held.experts}
        most = max(sum(counts.values()) for counts in ranks)
        uneven = sum(place.rows_over is not None for place in split.layout.placements)
        slack = len(split.layers(stage)) * uneven * config.model.gengram.dim
        assert most <= held.total <= most + slack
        if not uneven:
            assert {counts["copied"] for counts in ranks} == {held.copied}
            assert all(counts["rows"] == held.rows == 0 for counts in ranks)


@pytest.mark.parametrize("case", [case for case in CASES if "rows" not in case])
def test_stages_add_up_to_the_model(case):
    """Where nothing is cut but the pipeline."""
    name, _, words = CASES[case]
    words = [word for word in words if "tensor" not in word and "hash" not in word]
    config = load(name, *words, "parallel.expert=1", "train.global_batch_size=48")
    split = ShardedModel(config, check_layout(config, config.parallel.pipeline))
    total = sum(split.rank_parameters(stage).total for stage in range(split.layout.pipeline))
    assert total == count_parameters(config).total
    layers = [layer for stage in range(split.layout.pipeline) for layer in split.layers(stage)]
    assert sorted(layers) == list(range(1, config.model.num_layers + 1))
