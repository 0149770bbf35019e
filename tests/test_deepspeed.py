"""train.engine deepspeed trains as megatron-core's engine does, up to rounding; saves, and goes on
bit for bit; and each engine goes on from the other's checkpoints."""

import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.training import broken
from tests.training.launch import Ended, gengram, run_jobs
from tests.training.ranks import start_ranks
from tests.training.tiny import DENSE, build_data, entries, losses, numbers, write_config

# All runs are made in the fixture, which counts as part of the first test.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

# Two microbatches a step and rank, gradients that are clipped, rates that change, and settings of
# their own for the tables.
COMMON = (
    "model.num_layers=2",
    "model.gengram.layers=[1, 2]",
    "model.gengram.project=features",
    "optimizer.tables={lr_multiplier: 3, weight_decay: 0}",
    "optimizer.clip_grad=0.5",
    "optimizer.warmup_fraction=0.25",
    "train.validation_interval=2",
    "train.validation_samples=8",
    "checkpoint.interval=2",
)
MODELS = {
    "moe_fp32": (),
    "dense_bf16": (*DENSE, "train.precision=bf16"),
}
ROUNDING = {"moe_fp32": 1e-5, "dense_bf16": 2e-3}
# Else the weights of a model as small as this stay whole on every rank.
CUT_ALL = "train.deepspeed.extra={zero_optimization: {stage3_param_persistence_threshold: 0}}"
OFFLOAD = ("train.deepspeed.offload_optimizer=true",)
ENGINES = {
    "megatron": (),
    "zero1": ("train.engine=deepspeed", "train.deepspeed.zero_stage=1"),
    "zero2": ("train.engine=deepspeed", "train.deepspeed.zero_stage=2"),
    "zero3": ("train.engine=deepspeed", "train.deepspeed.zero_stage=3", CUT_ALL),
}
ENGINES |= {
    "zero2_offload": (*ENGINES["zero2"], *OFFLOAD),
    "zero3_offload": (*ENGINES["zero3"], *OFFLOAD, "train.deepspeed.offload_parameters=true"),
}
STAGES = ("zero1", "zero2", "zero3")
RUNS = (
    *(("moe_fp32", engine) for engine in ("megatron", *STAGES)),
    *(("dense_bf16", engine) for engine in ENGINES),
)
# Model, engine of the first half, engine that goes on from the checkpoint in the middle.
HALVES = (
    ("moe_fp32", "zero2", "zero2"),
    ("dense_bf16", "zero1", "zero1"),
    ("dense_bf16", "zero3", "zero3"),
    ("moe_fp32", "megatron", "zero2"),
    ("moe_fp32", "zero1", "megatron"),
    ("dense_bf16", "megatron", "zero3"),
    ("dense_bf16", "zero3_offload", "megatron"),
)
DATA, TENSOR, CONTEXT = (), ("parallel.tensor=2",), ("parallel.context=2",)
BF16 = MODELS["dense_bf16"]
#   name: settings; each of DeepSpeed's follows the one that it is compared with
FOUR = {
    "dp4_megatron": DATA,
    "dp4_zero3": (*DATA, *ENGINES["zero3"]),
    "cp2_megatron": CONTEXT,
    "cp2_zero2": (*CONTEXT, *ENGINES["zero2"]),
    "tp2_megatron": TENSOR,
    "tp2_zero2": (*TENSOR, *ENGINES["zero2"]),
    "tp2_bf16_megatron": (*TENSOR, *BF16),
    "tp2_bf16_zero1": (*TENSOR, *BF16, *ENGINES["zero1"]),
}


@dataclass(frozen=True)
class Runs:
    """Where all the runs lie, and what each rank of each job said."""

    folder: Path
    config: Path
    said: dict[str, list[Ended]]

    def __getitem__(self, name: str) -> Path:
        return self.folder / name

    def words(self, name: str, settings: tuple[str, ...]) -> list[str]:
        return ["train", str(self.config), f"run.dir={self[name]}", *COMMON, *settings]

    def launch(self, processes: int, jobs: dict[str, tuple[str, ...]]) -> None:
        """Run jobs by name, with settings of their own."""
        commands = {name: self.words(name, settings) for name, settings in jobs.items()}
        self.said.update(run_jobs(processes, commands, self.folder / f"jobs_{len(self.said)}"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """Whole runs, each of two steps and two more; the second half once more with the same engine or
    another; and runs on four processes. One launch for each."""
    folder = tmp_path_factory.mktemp("deepspeed")
    data = build_data(tmp_path_factory.getbasetemp() / "dna_64")
    this = Runs(folder, write_config(folder / "tiny.yaml", data), {})
    this.launch(2, {f"{m}_{e}": (*MODELS[m], *ENGINES[e]) for m, e in RUNS})
    second = {}
    for model, first, then in HALVES:
        name = f"{model}_{first}_{then}"
        shutil.copytree(this[f"{model}_{first}"], this[name])
        shutil.rmtree(this[name] / "checkpoints" / "step_00000004")
        second[name] = (*MODELS[model], *ENGINES[then])
    this.launch(2, second)
    this.launch(4, FOUR)
    return this


def assert_same(found: Path, expected: Path, rounding: float) -> None:
    """Losses, norms, rates and what else is measured, up to rounding."""
    lines = [numbers(found), numbers(expected)]
    assert [line.keys() for line in lines[0]] == [line.keys() for line in lines[1]]
    for line, other in zip(*lines):
        assert line.pop("kind") == other.pop("kind")
        norms = line.pop("grad_norm", 0), other.pop("grad_norm", 0)
        assert norms[0] == pytest.approx(norms[1], rel=10 * rounding)
        assert line == pytest.approx(other, rel=rounding)


@pytest.mark.parametrize(("model", "engine"), [run for run in RUNS if run[1] != "megatron"])
def test_numbers_are_those_of_megatron_core(runs: Runs, model: str, engine: str) -> None:
    expected = runs[f"{model}_megatron"]
    assert min(line["grad_norm"] for line in entries(expected, "train")) > 0.5  # clipped
    assert len(losses(expected)) == 4 and len(losses(expected, "validation")) == 2
    assert_same(runs[f"{model}_{engine}"], expected, ROUNDING[model])


@pytest.mark.parametrize("name", [name for name in FOUR if "zero" in name])
def test_so_they_are_on_four_processes(runs: Runs, name: str) -> None:
    layout = name.rpartition("_")[0]
    rounding = ROUNDING["dense_bf16" if "bf16" in name else "moe_fp32"]
    assert_same(runs[name], runs[f"{layout}_megatron"], rounding)


@pytest.mark.parametrize(("model", "first", "then"), HALVES)
def test_run_goes_on(runs: Runs, model: str, first: str, then: str) -> None:
    """Bit for bit with the same engine, up to rounding with the other."""
    name = f"{model}_{first}_{then}"
    assert "resuming after step 2, 4 steps" in runs.said[name][0].out
    if first == then:
        assert numbers(runs[name]) == numbers(runs[f"{model}_{first}"])
    else:
        assert_same(runs[name], runs[f"{model}_megatron"], ROUNDING[model])


def test_run_says_what_runs_and_nothing_else(runs: Runs) -> None:
    for engine in STAGES:
        (using,) = runs.said[f"moe_fp32_{engine}"][0].out.splitlines()[:1]
        assert "optimizer: DeepSpeed 0." in using
        assert f" ZeRO {engine[-1]} with torch AdamW, " in using and "device: 2 x CPU" in using
        expected = len(runs.said["moe_fp32_megatron"][0].out.splitlines())
        assert len(runs.said[f"moe_fp32_{engine}"][0].out.splitlines()) == expected
        assert not runs.said[f"moe_fp32_{engine}"][0].err
    said = [runs.said[f"dense_bf16_{engine}_offload"][0].out for engine in ("zero2", "zero3")]
    assert "AdamW, Adam in host memory, device" in said[0]
    assert "AdamW, weights and Adam in host memory, device" in said[1]


def test_checkpoint_has_the_common_form(runs: Runs) -> None:
    """The same tensors as megatron-core's, in bf16 and of every stage, and whole."""
    from gengram_megatron.checkpoint.stored import StoredTensors

    def tensors(name: str) -> dict:
        stored = StoredTensors(runs[name] / "checkpoints" / "step_00000004")
        return {key: (stored.shape(key), stored.dtype(key)) for key in stored.names}

    expected = tensors("dense_bf16_megatron")
    for engine in STAGES:
        assert tensors(f"dense_bf16_{engine}") == expected
        done = gengram("checkpoint", "verify", str(runs[f"dense_bf16_{engine}"]))
        assert done.code == 0, done.err


def test_what_deepspeed_does_not_take_is_told_in_a_sentence(runs: Runs) -> None:
    extra = "train.deepspeed.extra={zero_optimization: {nonsense: 1}}"
    done = gengram(*runs.words("nonsense", (*ENGINES["zero1"], extra)))
    assert done.code == 2
    (sentence,) = done.err.splitlines()
    assert "DeepSpeed does not take this config" in sentence and "nonsense" in sentence


def test_doctor_says_so(runs: Runs) -> None:
    words = [*COMMON, *ENGINES["zero2"], f"run.dir={runs['examined']}", "--quick", "--json"]
    done = gengram("doctor", str(runs.config), *words)
    found = json.loads(done.out)
    assert (done.code, found["problems"]) == (0, [])
    assert " ZeRO 2 with torch AdamW" in found["parts"]["optimizer"]["uses"]
    assert found["parts"]["optimizer"]["why"].startswith("train.engine is deepspeed")


WEIGHT = "decoder.layers.1.mlp.router.weight"


@pytest.mark.parametrize(
    ("model", "engine", "weight"),
    [
        ("dense_bf16", "zero1", "module.decoder.layers.1.mlp.linear_fc2.weight"),
        ("moe_fp32", "zero3", WEIGHT),
    ],
)
def test_nan_batch_is_left_out(runs: Runs, tmp_path, model: str, engine: str, weight: str) -> None:
    poison = partial(broken.poison_gradient, rank=1, step=2, name=weight, times=2)
    settings = (*MODELS[model], *ENGINES[engine], "train.on_nan=skip")
    words = runs.words(f"skip_{engine}", settings)
    ended = start_ranks(2, words, tmp_path / "said", before=poison).wait()
    assert [said.code for said in ended] == [0, 0], ended[0].err
    names = (f"skip_{engine}", f"{model}_{engine}")
    lines, whole = (entries(runs[name], "train") for name in names)
    assert [line["skipped"] for line in lines] == [0, 1, 0, 0]
    # The first step has a rate of 0, so the third is computed with the weights of the start.
    assert [line["loss"] for line in lines[:2]] == [line["loss"] for line in whole[:2]]
    assert lines[2]["loss"] > 1.2 * whole[2]["loss"]
    assert lines[3]["loss"] < 0.9 * lines[2]["loss"]


def test_nan_stops_the_run_and_is_traced(runs: Runs, tmp_path) -> None:
    poison = partial(broken.poison_gradient, rank=1, step=2, name=WEIGHT, times=1000)
    words = runs.words("stopped", ENGINES["zero2"])
    ended = start_ranks(2, words, tmp_path / "said", before=poison).wait()
    assert [said.code for said in ended] == [2, 2], ended[0].err
    found = "on rank 1, the gradient of layer 2.mlp.router.weight is not finite"
    assert "step 2: loss" in ended[0].err and found in ended[0].err
