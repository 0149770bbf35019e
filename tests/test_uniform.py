"""The warning of a run that predicts bases no better than a guess: both sides of its rule."""

import math

import numpy as np
import pytest

from gengram_megatron.config.schema import Config
from gengram_megatron.runs.metrics import UNIFORM, UniformCheck

WARM_UP = 20


def judged(losses: np.ndarray, warm_up: int = WARM_UP) -> tuple[list[int], bool]:
    """The steps at which a run of these losses warns, and whether it does at its end."""
    config = Config.model_validate(
        {
            "run": {"dir": "run"},
            "model": {
                "hidden_size": 8,
                "num_layers": 1,
                "num_attention_heads": 1,
                "ffn_hidden_size": 8,
                "seq_length": 16,
            },
            "data": {"path": "datasets/some"},
            "train": {"global_batch_size": 4, "steps": len(losses)},
            "optimizer": {"warmup_fraction": warm_up / len(losses)},
        }
    )
    check = UniformCheck(config, 4 * len(losses))
    steps = range(1, len(losses) + 1)
    warned = [step for step, loss in zip(steps, losses) if check.after_step(step, loss)]
    return warned, check.at_end() is not None


def noise(steps: int, seed: int, deviation: float = 0.02) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, deviation, steps)


def falling(steps: int, crossing: int) -> np.ndarray:
    """From 5.5 nats through ln 4 at a step to 1.33."""
    rate = math.log((5.5 - 1.33) / (UNIFORM - 1.33)) / crossing
    return 1.33 + (5.5 - 1.33) * np.exp(-rate * np.arange(1, steps + 1))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("above", [0.02, 0.2, 3.0])
def test_a_run_above_uniform_says_so_once_and_at_its_end(above, seed):
    assert judged(UNIFORM + above + noise(500, seed)) == ([WARM_UP + 100], True)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("deviation", [0.005, 0.02, 0.1])
def test_noise_around_a_loss_just_below_uniform_says_nothing(deviation, seed):
    losses = UNIFORM - deviation / 4 + noise(1000, seed, deviation)
    assert losses[-100:].max() > UNIFORM
    assert judged(losses) == ([], False)


@pytest.mark.parametrize("steps", [1, 8, 21, WARM_UP + 39])
def test_a_run_of_few_steps_after_warm_up_says_nothing(steps):
    assert judged(np.full(steps, 5.5), warm_up=min(steps, WARM_UP)) == ([], False)


def test_a_short_run_says_so_at_its_end():
    assert judged(np.full(WARM_UP + 40, 1.45)) == ([], True)
    assert judged(np.full(WARM_UP + 99, 1.45)) == ([], True)
    assert judged(np.full(WARM_UP + 40, UNIFORM)) == ([], False)


@pytest.mark.parametrize("crossing", [WARM_UP, 60, 85, 115])
def test_a_run_that_has_come_down_says_nothing(crossing):
    """Until 100 steps after warm-up; the last crosses five steps before."""
    assert judged(falling(400, crossing)) == ([], False)


def test_a_run_that_comes_down_later_says_so_once_and_not_at_its_end():
    assert judged(falling(2000, 600)) == ([WARM_UP + 100], False)


def test_a_spike_says_nothing_and_a_run_that_stays_up_does():
    losses = 1.33 + noise(1000, 1)
    losses[400:440] += 3
    assert judged(losses) == ([], False)
    losses[400:] += 3
    (step,), at_end = judged(losses)
    assert 450 <= step <= 500 and at_end


def test_losses_that_are_not_finite_are_left_out():
    losses = UNIFORM + 0.1 + noise(300, 2)
    losses[::2] = np.nan
    # Of the steps after warm-up every second counts.
    assert judged(losses) == ([WARM_UP + 200], True)
    assert judged(np.full(300, math.nan)) == ([], False)


def test_the_warning_names_what_to_look_at():
    config = {
        "run": {"dir": "run"},
        "model": {
            "hidden_size": 8,
            "num_layers": 1,
            "num_attention_heads": 1,
            "ffn_hidden_size": 8,
            "seq_length": 16,
            "init_std": 0.7,
        },
        "data": {"path": "datasets/some"},
        "train": {"global_batch_size": 4, "steps": 100},
        "optimizer": {"warmup_fraction": 0, "lr": 3e-9},
    }
    check = UniformCheck(Config.model_validate(config), 400)
    said = [check.after_step(step, 1.5) for step in range(1, 101)]
    for sentence in (said[-1], check.at_end()):
        for part in (
            "1.5000",
            "1.3863",
            "optimizer.lr (3e-09)",
            "model.init_std (0.7)",
            "train.precision (bf16)",
            "gengram-data inspect datasets/some",
            "gengram-data verify datasets/some",
            "model.gengram.token_ids",
        ):
            assert part in sentence
    assert said[:-1] == [None] * 99
