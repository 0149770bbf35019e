"""Optimizer and schedule of the paper's configs are those of its published launches."""

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from gengram_megatron.commands.plan import smallest_world
from gengram_megatron.config.layout import check_layout, with_gengram
from gengram_megatron.config.schema import Config
from tests.plan.configs import GENOS, PAPER, RUNS, load
from tests.training.tiny import RUN

LR, MIN_LR, BATCH, DECAY_PERCENT, WEIGHT_DECAY = 1e-4, 1e-5, 1024, 80, 0.1


@dataclass(frozen=True)
class PublishedLaunch:
    """What a launch gives as --train-samples and --lr-warmup-fraction."""

    train_samples: int
    warmup_fraction: float

    @property
    def decay_samples(self) -> int:
        """--lr-decay-samples, which the launches compute in the shell's whole numbers."""
        return self.train_samples * DECAY_PERCENT // 100

    @property
    def warmup_samples(self) -> float:
        """Megatron-LM multiplies its fraction by the samples of the decay and does not round."""
        return self.warmup_fraction * self.decay_samples


# The samples of both Genos models are chosen here: in their launches they are an argument.
LAUNCHES = {
    "pretrain_200b_8k/baseline": PublishedLaunch(25_066_252, 0.05),
    "pretrain_200b_8k/gengram_window_21": PublishedLaunch(25_066_252, 0.05),
    "genos/gengram_10b": PublishedLaunch(25_066_252, 0.05),
    "genos/genos_1.2b": PublishedLaunch(195_312_500, 0.1),
    "genos/genos_10b": PublishedLaunch(268_554_687, 0.05),
}


def groups() -> SimpleNamespace:
    """As much of an optimizer as a schedule sees: weights that decay, and those that do not."""
    return SimpleNamespace(param_groups=[{"wd_mult": 1.0}, {"wd_mult": 0.0}])


def published_schedule(launch: PublishedLaunch):
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    return OptimizerParamScheduler(
        groups(),
        init_lr=0.0,
        max_lr=LR,
        min_lr=MIN_LR,
        lr_warmup_steps=launch.warmup_samples,
        lr_decay_steps=launch.decay_samples,
        lr_decay_style="cosine",
        start_wd=WEIGHT_DECAY,
        end_wd=WEIGHT_DECAY,
        wd_incr_steps=launch.train_samples,
        wd_incr_style="constant",
    )


def our_schedule(config: Config):
    from gengram_megatron.engine.training.optimizer import build_schedule

    return build_schedule(config, check_layout(config, smallest_world(config)), groups())


def close(ours: float, theirs: float) -> bool:
    return abs(ours - theirs) <= 1e-12 * theirs


@pytest.mark.parametrize("name", LAUNCHES)
def test_every_step_has_the_published_rate_and_weight_decay(name: str) -> None:
    launch, config = LAUNCHES[name], load(name)
    ours, theirs = our_schedule(config), published_schedule(launch)
    assert config.train.samples == launch.train_samples
    for step in range(launch.train_samples // BATCH):
        for own, published in zip(ours.optimizer.param_groups, theirs.optimizer.param_groups):
            assert close(own["lr"], published["lr"]), (step, own, published)
            assert own["weight_decay"] == published["weight_decay"]
        ours.step(BATCH)
        theirs.step(BATCH)
    assert [group["weight_decay"] for group in ours.optimizer.param_groups] == [WEIGHT_DECAY, 0.0]
    assert ours.optimizer.param_groups[0]["lr"] == MIN_LR  # long before the last step


def test_the_decay_of_the_formal_runs_is_cut_as_the_shell_cuts_it() -> None:
    """80 % of 25,066,252 are 20,053,001.6."""
    ours = our_schedule(load("pretrain_200b_8k/baseline"))
    assert ours.lr_decay_steps == 20_053_001
    assert ours.lr_warmup_steps == pytest.approx(1_002_650.05, rel=1e-15)


def test_another_warm_up_would_be_seen() -> None:
    """5 % of all samples, as these configs had it, give another rate at most steps."""
    launch = LAUNCHES["pretrain_200b_8k/baseline"]
    ours = our_schedule(load("pretrain_200b_8k/baseline", "optimizer.warmup_fraction=0.05"))
    theirs = published_schedule(launch)
    different = 0
    for _ in range(launch.decay_samples // BATCH):
        ours.step(BATCH)
        theirs.step(BATCH)
        (own, _), (published, _) = ours.optimizer.param_groups, theirs.optimizer.param_groups
        different += not close(own["lr"], published["lr"])
    assert different > 0.99 * (launch.decay_samples // BATCH)


@pytest.mark.parametrize(
    "warmup, decay, ends",
    [
        (0, 0, (0, 1)),
        (0, 1, (0, 100)),
        (1, 1, (100, 101)),
        (0.3, 0.3, (30, 31)),
        (0.001, 0.29, (0.1, 29)),  # 0.29 * 100 is 28.999999999999996 in float64
    ],
)
def test_ends_of_schedules(warmup: float, decay: float, ends: tuple[float, int]) -> None:
    """The decay ends later than the warm-up, and a whole number stays what it is."""
    words = [f"optimizer.warmup_fraction={warmup}", f"optimizer.decay_fraction={decay}"]
    words += ["train.steps=100", "train.global_batch_size=1", "train.micro_batch_size=1"]
    schedule = our_schedule(load("smoke/one_gpu", *words))
    assert (schedule.lr_warmup_steps, schedule.lr_decay_steps) == ends


# Twelve steps, against Adam written down


STEPS, TINY_BATCH, TINY_SAMPLES = 12, 8, 101  # 80 % of 101 are no whole number
TINY_LR, TINY_MIN_LR, CLIP = 1e-3, 1e-4, 1.0
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def tiny_config(**optimizer) -> Config:
    """A mixture of experts with memory. As in the paper's configs but for the rates: warm-up over
    5 % of the decay's samples, and what is not given is the schema's default. Initial weights small
    enough that twelve steps do not multiply the rounding of float32."""
    gengram = {"enabled": True, "layers": [2, 3], "dim": 8, "init": "published"}
    settings = {"lr": TINY_LR, "min_lr": TINY_MIN_LR, "warmup_fraction": 0.04}
    train = {key: value for key, value in RUN["train"].items() if key != "steps"}
    return Config.model_validate(
        {
            **RUN,
            "run": {"dir": "unused", "seed": 5},
            "model": {**RUN["model"], "init_std": 0.02, "gengram": gengram},
            "data": {"path": "unused"},
            "optimizer": {**settings, "decay_fraction": 0.8, **optimizer},
            "train": {**train, "samples": TINY_SAMPLES, "micro_batch_size": TINY_BATCH},
        }
    )


def batches() -> list[torch.Tensor]:
    """Token ids of each step, [b, L + 1]; the last one is EOD."""
    draw, length = torch.Generator().manual_seed(11), RUN["model"]["seq_length"]
    bases = torch.tensor([8, 5, 6, 7], dtype=torch.uint8)
    tokens = bases[torch.randint(0, 4, (STEPS, TINY_BATCH, length + 1), generator=draw)]
    tokens[..., -1] = 12
    return list(tokens)


def train_as_runs_do(layout, config: Config) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of twelve steps with a run's model, optimizer and schedule."""
    from gengram_megatron.engine.model.build import build_model, wrap_for_data_parallelism
    from gengram_megatron.engine.training.optimizer import build_optimizer, build_schedule
    from gengram_megatron.engine.training.step import forward_backward

    layout = replace(layout, steps=STEPS, samples=STEPS * TINY_BATCH)
    chunks = wrap_for_data_parallelism(
        build_model(config, with_gengram(layout, config)), config, layout
    )
    optimizer = build_optimizer(config, chunks)
    schedule = build_schedule(config, layout, optimizer)
    losses, norms = [], []
    for tokens in batches():
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        total, scored = forward_backward(
            chunks, [tokens], config, layout, forward_only=False
        ).tolist()
        losses.append(total / scored)
        norms.append(optimizer.step_if(lambda norm: True))
        schedule.step(TINY_BATCH)
    return losses, norms


def loss_of(model, tokens: torch.Tensor) -> torch.Tensor:
    """Mean loss in nats over the bases; an EOD is not scored. The model adds its auxiliary losses
    to the gradients by itself."""
    tokens = tokens.long()
    labels = tokens[:, 1:]
    losses = model(tokens[:, :-1], labels)
    return losses[labels != 12].double().mean()


def published_rate(samples: int) -> float:
    """The learning rate of a step that begins after so many samples."""
    decay = TINY_SAMPLES * 80 // 100
    warmup = 0.05 * decay
    if samples <= warmup:
        return TINY_LR * samples / warmup
    if samples > decay:
        return TINY_MIN_LR
    cosine = math.cos(math.pi * (samples - warmup) / (decay - warmup))
    return TINY_MIN_LR + (TINY_LR - TINY_MIN_LR) * (cosine + 1) / 2


def train_by_formulas(layout, config: Config) -> tuple[list[float], list[float]]:
    """The same with Adam written down, in float64, for weights that the float32 model copies.

    Of config only the model is read. As in Megatron-LM weights of one dimension do not decay.
    """
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from gengram_megatron.engine.model.build import build_model

    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))  # as the schedules do, in the same shape
    (model,) = build_model(config, with_gengram(layout, config))
    weights = list(model.parameters())
    exact = [weight.detach().double() for weight in weights]
    first = [torch.zeros_like(weight) for weight in exact]
    second = [torch.zeros_like(weight) for weight in exact]
    losses, norms = [], []
    for step, tokens in enumerate(batches()):
        loss = loss_of(model, tokens)
        gradients = [gradient.double() for gradient in torch.autograd.grad(loss, weights)]
        norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))
        rate = published_rate(step * TINY_BATCH)
        for i, gradient in enumerate(gradients):
            gradient = gradient * min(1.0, CLIP / (norm + 1e-6))
            first[i] = BETA1 * first[i] + (1 - BETA1) * gradient
            second[i] = BETA2 * second[i] + (1 - BETA2) * gradient**2
            mean = first[i] / (1 - BETA1 ** (step + 1))
            square = second[i] / (1 - BETA2 ** (step + 1))
            decay = WEIGHT_DECAY if exact[i].dim() > 1 else 0.0
            exact[i] = exact[i] - rate * (mean / (square.sqrt() + EPSILON) + decay * exact[i])
            weights[i].data.copy_(exact[i])
        losses.append(loss.item())
        norms.append(norm)
    return losses, norms


@pytest.fixture(scope="module")
def by_formulas(one_process) -> tuple[list[float], list[float]]:
    return train_by_formulas(one_process, tiny_config())


def test_twelve_steps_are_those_of_the_published_formulas(one_process, by_formulas) -> None:
    """On the published code twelve steps at lr 1e-3 ended at a loss of 2.3093 with beta2 0.999 and
    at 2.2968 with 0.95. The weights and the data that gave these figures were not kept, so they
    cannot be met here; the formulas that they come from can."""
    losses, norms = train_as_runs_do(one_process, tiny_config())
    assert losses == pytest.approx(by_formulas[0], rel=0, abs=1e-6)
    assert norms == pytest.approx(by_formulas[1], rel=1e-3)
    assert losses[-1] < losses[0] - 0.1  # something was trained
    assert min(norms) > CLIP  # every step was clipped


@pytest.mark.parametrize(
    "other",
    [
        {"beta2": 0.95},
        {"weight_decay": 0.0},
        {"clip_grad": 0.0},
        {"warmup_fraction": 0.05},
        {"decay_fraction": 1.0},
    ],
    ids=str,
)
def test_other_settings_give_other_losses(one_process, by_formulas, other: dict) -> None:
    losses, _ = train_as_runs_do(one_process, tiny_config(**other))
    assert losses != pytest.approx(by_formulas[0], rel=0, abs=1e-5)


# The configs


@pytest.mark.parametrize("name", [*PAPER, *GENOS, "smoke/moe_1.2b_8k_one_gpu"])
def test_configs_have_the_published_optimizer(name: str) -> None:
    config = load(name)
    optimizer = config.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.9, 0.999, 1e-8)
    assert (optimizer.lr, optimizer.min_lr) == (LR, MIN_LR)
    assert (optimizer.weight_decay, optimizer.clip_grad) == (WEIGHT_DECAY, 1.0)
    warmup = 0.08 if name.startswith("genos/genos_1.2b") else 0.04
    assert (optimizer.warmup_fraction, optimizer.decay_fraction) == (warmup, 0.8)
    assert config.model.gengram.init == "published"


def test_defaults_of_adam_are_those_of_megatron() -> None:
    from megatron.core.optimizer import OptimizerConfig

    ours, theirs = tiny_config().optimizer, OptimizerConfig()
    assert (ours.beta1, ours.beta2) == (theirs.adam_beta1, theirs.adam_beta2)
    assert ours.eps == theirs.adam_eps


@pytest.mark.parametrize("name", [n for n in RUNS if n.startswith("smoke/") and "1.2b" not in n])
def test_short_runs_keep_a_short_memory(name: str) -> None:
    """A second moment over 1,000 steps says little in 80; the README's tables are of 0.95."""
    assert load(name).optimizer.beta2 == 0.95
