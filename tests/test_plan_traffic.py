"""Bytes that a plan says a rank sends, against those of a training step of a small model, whose
groups pretend (tests/plan/ranks.py)."""

import pytest
import torch

from gengram_megatron.plan.communication import of_stage
from gengram_megatron.plan.stages import ShardedModel
from tests.plan.ranks import as_rank
from tests.plan.small import DENSE, MEMORY, MHA, config_of, step
from tests.plan.traffic import Traffic

ROWS = {"gengram": {**MEMORY["gengram"], "split": "rows"}}
FOUR_LAYERS = {**DENSE, **MEMORY, "num_layers": 4}
VPP = {"pipeline": 2, "virtual_pipeline": 2}

#   name: (processes, model, layout, recompute)
CASES = {
    "tensor": (2, DENSE, {"tensor": 2}, "none"),
    "tensor_full": (2, DENSE, {"tensor": 2}, "full"),
    "tensor_selective": (2, DENSE, {"tensor": 2}, "selective"),
    "tensor_no_sequence": (2, {**DENSE, **MEMORY}, {"tensor": 2, "sequence": False}, "none"),
    "pipeline": (2, FOUR_LAYERS, {"pipeline": 2}, "none"),
    "interleaved": (2, FOUR_LAYERS, VPP, "none"),
    "data": (4, {**DENSE, **MEMORY}, {}, "none"),
    "context": (2, {**DENSE, **MHA}, {"context": 2}, "none"),
    "context_full": (2, DENSE, {"context": 2}, "full"),
}


@pytest.fixture(autouse=True)
def plain_mask(monkeypatch):
    """torch's description of a mask cannot be made while operations are watched."""
    from gengram_megatron.engine.model import attention

    def mask(query, key):
        length, seen = query.shape[2], key.shape[2]
        return torch.ones(length, seen, dtype=torch.bool).tril(seen - length)

    monkeypatch.setattr(attention, "_lower_right_mask", mask)


def watched(case: tuple) -> tuple[ShardedModel, Traffic]:
    from gengram_megatron.engine.model.build import build_model, wrap_for_data_parallelism
    from gengram_megatron.engine.training.optimizer import build_optimizer

    config, layout = config_of(*case)
    with as_rank(layout, 0):
        chunks = wrap_for_data_parallelism(build_model(config, layout), config, layout)
        optimizer = build_optimizer(config, chunks)
        with Traffic() as traffic:
            step(chunks, optimizer, config, layout)
    return ShardedModel(config, layout), traffic


@pytest.mark.parametrize("case", CASES)
def test_what_the_first_rank_sends(case):
    """To 2 %: gradients of norms and single numbers are not in the plan."""
    split, traffic = watched(CASES[case])
    planned = of_stage(split, 0)
    print(f"{case}: {planned.total / sum(traffic.sent.values()) - 1:+.2%}", dict(traffic.sent))
    assert planned.total == pytest.approx(sum(traffic.sent.values()), rel=0.02)


def test_experts():
    """The experts' rows go out and come back, forward and backward. Where they go the numbers
    decide, which are wrong here: what comes back is not of the size that went out."""
    split, traffic = watched((2, {}, {"expert": 2}, "none"))
    assert of_stage(split, 0).expert == pytest.approx(traffic.sent["alltoall_base_"], rel=0.2)


def test_memory_rows_are_at_most_those_of_the_plan():
    """Tokens that look up the same row fetch it once."""
    split, traffic = watched((2, {**DENSE, **ROWS}, {}, "none"))
    planned = of_stage(split, 0).memory_rows
    assert 0.5 * planned < traffic.sent["alltoall_base_"] <= planned
