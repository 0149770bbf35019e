"""train.engine deepspeed trains as megatron-core's engine does, up to rounding, and each goes on from
the other's checkpoints."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.training.launch import Ended, run_jobs
from tests.training.tiny import DENSE, build_data, entries, losses, write_config

# All runs are made in the fixture, which counts as part of the first test.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

TABLES = "optimizer.tables={lr_multiplier: 3, weight_decay: 0}"
# Two validations, two microbatches a step, clipping (norms are above 1), a warm-up.
COMMON = (
    TABLES,
    "train.validation_interval=2",
    "train.validation_samples=8",
    "optimizer.clip_grad=0.5",
    "optimizer.warmup_fraction=0.25",
    "model.num_layers=2",
    "model.gengram.layers=[1, 2]",
    "model.gengram.project=features",
)
MODELS = {
    "moe_fp32": (),
    "dense_bf16": (*DENSE, "train.precision=bf16"),
}
# Else all weights of a model as small as this stay whole on every rank.
CUT_ALL = "train.deepspeed.extra={zero_optimization: {stage3_param_persistence_threshold: 0}}"
STAGES = (1, 2, 3)


def zero(stage: int) -> tuple[str, ...]:
    """Settings of a stage."""
    words = ("train.engine=deepspeed", f"train.deepspeed.zero_stage={stage}")
    return (*words, CUT_ALL) if stage == 3 else words


def jobs() -> dict[str, tuple[str, ...]]:
    """Run, and its settings; those of one run come after one another."""
    found = {}
    for model, settings in MODELS.items():
        found[f"{model}_megatron"] = settings
        for stage in STAGES:
            found[f"{model}_zero{stage}"] = (*settings, *zero(stage))
    return found


@dataclass(frozen=True)
class Runs:
    folder: Path
    config: Path
    said: dict[str, list[Ended]]

    def __getitem__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("deepspeed")
    data = build_data(tmp_path_factory.getbasetemp() / "dna_64")
    config = write_config(folder / "tiny.yaml", data)
    commands = {
        name: ["train", str(config), f"run.dir={folder / name}", *COMMON, *settings]
        for name, settings in jobs().items()
    }
    return Runs(folder, config, run_jobs(2, commands, folder / "jobs_2"))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("model", MODELS)
def test_losses_are_those_of_megatron_core(runs: Runs, model: str, stage: int) -> None:
    expected, found = runs[f"{model}_megatron"], runs[f"{model}_zero{stage}"]
    rel = 1e-5 if "fp32" in model else 2e-3
    for kind in ("train", "validation"):
        assert losses(found, kind) == pytest.approx(losses(expected, kind), rel=rel)
    norms = [[line["grad_norm"] for line in entries(run, "train")] for run in (found, expected)]
    assert min(norms[1]) > 0.5  # clipped in every step
    assert norms[0] == pytest.approx(norms[1], rel=1e-4 if "fp32" in model else 2e-2)
