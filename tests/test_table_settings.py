"""optimizer.tables acts on the Gengram tables, and on nothing else."""

import pytest
import torch

from gengram_megatron.config.layout import with_gengram
from gengram_megatron.config.schema import Config
from tests.training.tiny import RUN

LR, DECAY = 0.01, 0.5
BATCH, LENGTH = 8, 64
# A bias that is not zero at the start, so that its decay would show.
GENGRAM = {**RUN["model"]["gengram"], "projection_bias": True, "init": "published"}


def config_of(optimizer: dict, precision: str) -> Config:
    settings = {"lr": LR, "min_lr": LR / 10, "weight_decay": DECAY, "warmup_fraction": 0.0}
    return Config.model_validate(
        {
            **RUN,
            "run": {"dir": "unused", "seed": 5},
            "model": {**RUN["model"], "gengram": GENGRAM},
            "data": {"path": "unused"},
            "optimizer": {**settings, **optimizer},
            "train": {**RUN["train"], "precision": precision},
        }
    )


def first_step(layout, precision: str = "fp32", **optimizer) -> dict[str, torch.Tensor]:
    """Every parameter, before and after a step: name to [2, ...]."""
    from gengram_megatron.engine.model.build import build_model, wrap_for_data_parallelism
    from gengram_megatron.engine.training.optimizer import build_optimizer, build_schedule
    from gengram_megatron.engine.training.step import forward_backward
    from tests.layouts.worker import batch

    config = config_of(optimizer, precision)
    chunks = wrap_for_data_parallelism(
        build_model(config, with_gengram(layout, config)), config, layout
    )
    adam = build_optimizer(config, chunks)
    build_schedule(config, layout, adam)
    named = dict(chunks[0].module.named_parameters())
    before = {name: parameter.detach().float().clone() for name, parameter in named.items()}
    micro = iter(batch(BATCH, LENGTH).split(BATCH))
    forward_backward(chunks, micro, config, layout, forward_only=False)
    adam.step()
    return {name: torch.stack([before[name], p.detach().float()]) for name, p in named.items()}


@pytest.fixture(scope="module")
def usual(one_process) -> dict[str, torch.Tensor]:
    return first_step(one_process)


def is_table(name: str) -> bool:
    return ".tables." in name


def check_rest_is_as_usual(step: dict, usual: dict) -> None:
    rest = [name for name in usual if not is_table(name)]
    assert len(rest) > 20 and len(usual) - len(rest) == 12  # two layers of six tables
    for name in rest:
        assert torch.equal(step[name], usual[name]), name


def moved(step: torch.Tensor) -> torch.Tensor:
    return step[1] - step[0]


def untouched(name: str, usual: dict) -> torch.Tensor:
    """Rows of a table that no token of the batch reads: they only decay."""
    before, after = usual[name]
    return ((after - before) + LR * DECAY * before).abs().amax(1) < 1e-6


def test_usual_step_is_that_of_adam(usual) -> None:
    """The first step of Adam moves each weight by its rate, after the decay."""
    tables = [name for name in usual if is_table(name)]
    for name in tables:
        before, after = usual[name]
        step = ((after - before) + LR * DECAY * before).abs()
        assert step.max() == pytest.approx(LR, rel=1e-2), name
    assert untouched(tables[-1], usual).float().mean() > 0.9
    flat = [name for name, step in usual.items() if step[0].dim() == 1]
    biases = [name for name in flat if name.endswith("projection.bias")]
    assert len(biases) == 2 and len(flat) > len(biases)
    for name in flat:  # no decay: a norm's weight of 1 would move by more than its rate
        assert moved(usual[name]).abs().max() <= LR * 1.001, name
    for name in biases:
        assert (LR * DECAY * usual[name][0]).abs().max() > LR * 0.05
        assert moved(usual[name]).abs().max() == pytest.approx(LR, rel=1e-3), name


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("multiplier", [0.01, 10.0])
def test_rate_of_the_tables(one_process, usual, multiplier: float, distributed: bool) -> None:
    step = first_step(one_process, tables={"lr_multiplier": multiplier}, distributed=distributed)
    check_rest_is_as_usual(step, usual)
    for name in filter(is_table, usual):
        # What the steps are added to is rounded, and that of the usual step counts many times.
        torch.testing.assert_close(
            moved(step[name]),
            multiplier * moved(usual[name]),
            rtol=1e-3,
            atol=1e-6 * max(multiplier, 1),
        )


@pytest.mark.parametrize("distributed", [True, False])
def test_decay_of_the_tables(one_process, usual, distributed: bool) -> None:
    step = first_step(one_process, tables={"weight_decay": 0.0}, distributed=distributed)
    check_rest_is_as_usual(step, usual)
    for name in filter(is_table, usual):
        before, after = step[name]
        rows = untouched(name, usual)
        assert torch.equal(after[rows], before[rows]), name
        undone = usual[name][1] + LR * DECAY * before
        torch.testing.assert_close(after, undone, rtol=1e-5, atol=1e-6)


def test_bf16_tables_take_their_own_rate(one_process) -> None:
    usual = first_step(one_process, "bf16")
    step = first_step(one_process, "bf16", tables={"lr_multiplier": 1e-6})
    check_rest_is_as_usual(step, usual)
    for name in filter(is_table, usual):
        assert torch.equal(step[name][0], step[name][1]), name
        assert not torch.equal(usual[name][0], usual[name][1]), name


def test_rates_of_the_whole_schedule_keep_their_ratio(one_process) -> None:
    from dataclasses import replace

    from gengram_megatron.engine.model.build import build_model, wrap_for_data_parallelism
    from gengram_megatron.engine.training.optimizer import build_optimizer, build_schedule

    config = config_of({"tables": {"lr_multiplier": 4.0}, "warmup_fraction": 0.2}, "fp32")
    layout = replace(one_process, steps=10, samples=80)
    chunks = wrap_for_data_parallelism(
        build_model(config, with_gengram(one_process, config)), config, one_process
    )
    adam = build_optimizer(config, chunks)
    schedule = build_schedule(config, layout, adam)
    for _ in range(12):
        rates = {g["lr"] for g in adam.param_groups if not g["is_decoupled_lr"]}
        tables = {g["lr"] for g in adam.param_groups if g["is_decoupled_lr"]}
        assert len(rates) == len(tables) == 1
        assert tables.pop() == pytest.approx(4 * rates.pop())
        schedule.step(8)
