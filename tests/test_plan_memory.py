"""Bytes that a plan gives to a rank, against those of a training step of a small model.

On a GPU norms and SwiGLU are one kernel each and keep only their input; here they are made to. The
groups pretend (tests/plan/ranks.py): nobody answers, so numbers are wrong and shapes are right.
"""

import pytest
import torch

from gengram_megatron.plan.memory import of_stage
from gengram_megatron.plan.stages import ShardedModel
from tests.plan.meter import Meter
from tests.plan.ranks import as_rank
from tests.plan.small import DENSE, MEMORY, MHA, MLA, SIZES, config_of, step

#   name: (processes, model, layout, recompute)
CASES = {
    "moe": (1, MEMORY, {}, "none"),
    "moe_selective": (1, MEMORY, {}, "selective"),
    "moe_full": (1, MEMORY, {}, "full"),
    "dense": (1, {**DENSE, **MEMORY}, {}, "none"),
    "dense_selective": (1, {**DENSE, **MEMORY}, {}, "selective"),
    "dense_full": (1, {**DENSE, **MEMORY}, {}, "full"),
    "dense_mha": (1, {**DENSE, **MHA}, {}, "none"),
    "dense_mla": (1, {**DENSE, **MLA}, {}, "none"),
    "moe_mla_queries": (1, {**MLA, "mla": {**SIZES, "q_lora_rank": 48}}, {}, "selective"),
    "pp2": (2, {**DENSE, **MEMORY, "num_layers": 4}, {"pipeline": 2}, "none"),
    "pp4": (4, {**DENSE, "num_layers": 4}, {"pipeline": 4}, "none"),
    "pp2_vpp2": (
        2,
        {**DENSE, **MEMORY, "num_layers": 4},
        {"pipeline": 2, "virtual_pipeline": 2},
        "none",
    ),
    "tp2_sp": (2, {**DENSE, **MEMORY}, {"tensor": 2}, "none"),
    "tp2": (2, DENSE, {"tensor": 2, "sequence": False}, "none"),
    "dp4": (4, {**DENSE, **MEMORY}, {}, "none"),
}


class _FusedNorm(torch.autograd.Function):
    """RMSNorm that keeps its input and one number a row."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return x * scale * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normed, grad_normed = x * scale, grad * weight
        shift = (grad_normed * normed).mean(-1, keepdim=True)
        return scale * (grad_normed - normed * shift), (grad * normed).flatten(0, -2).sum(0), None


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    from gengram_megatron.engine.model import build, gpt

    own = build.transformer_config

    def with_fused_swiglu(config, layout):
        settings = own(config, layout)
        settings.bias_activation_fusion = True
        return settings

    monkeypatch.setattr(build, "transformer_config", with_fused_swiglu)
    monkeypatch.setattr(
        gpt.RMSNorm, "forward", lambda self, x: _FusedNorm.apply(x, self.weight, self.eps)
    )


@pytest.mark.parametrize("case", CASES)
def test_peak(case, as_on_a_gpu):
    """Of a step on the first pipeline rank, weights and optimizer included: within 6 %."""
    config, layout = config_of(*CASES[case])
    from gengram_megatron.engine.model.build import build_model, wrap_for_data_parallelism
    from gengram_megatron.engine.training.optimizer import build_optimizer

    split = ShardedModel(config, layout)
    with as_rank(layout, 0), Meter() as meter:
        chunks = wrap_for_data_parallelism(build_model(config, layout), config, layout)
        planned = of_stage(split, 0)
        held = planned.weights + planned.gradients
        assert meter.now() == pytest.approx(held, rel=0.01)
        optimizer = build_optimizer(config, chunks)
        step(chunks, optimizer, config, layout)
        meter.start_again()
        step(chunks, optimizer, config, layout)
        most = meter.most
    print(f"{case}: {planned.total / most - 1:+.1%} of {most:,}")  # pytest -s shows it
    assert planned.total == pytest.approx(most, rel=0.06)


def test_a_plain_optimizer_keeps_all_states_on_every_rank() -> None:
    plain, split = (
        of_stage(ShardedModel(config, layout), 0)
        for config, layout in map(_dp4, ({"distributed": False}, {}))
    )
    assert plain.optimizer == pytest.approx(4 * split.optimizer, rel=0.01)
    assert plain.weights == split.weights and plain.gradients == split.gradients


def _dp4(optimizer: dict):
    config, layout = config_of(*CASES["dp4"])
    return config.model_copy(
        update={"optimizer": config.optimizer.model_copy(update=optimizer)}
    ), layout
