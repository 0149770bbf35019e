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
BF16, EXPERT = ("train.precision=bf16",), ("parallel.expert=2",)
MODELS = {
    "moe_fp32": (),
    "dense_bf16": (*DENSE, *BF16),
    "ep2_fp32": EXPERT,
    "ep2_bf16": (*EXPERT, *BF16),
}
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
RUNS = {
    "moe_fp32": ("megatron", *STAGES),
    "dense_bf16": tuple(ENGINES),
    "ep2_fp32": ("megatron", "zero1", "zero2", "zero2_offload"),
    "ep2_bf16": ("megatron", "zero1", "zero2"),
}
TWO = {
    f"{model}_{engine}": (*MODELS[model], *ENGINES[engine])
    for model, engines in RUNS.items()
    for engine in engines
}
DATA, TENSOR, CONTEXT = (), ("parallel.tensor=2",), ("parallel.context=2",)
WHOLE_EXPERTS = ("parallel.expert=4", "parallel.expert_tensor=1")
#   name: settings; each of DeepSpeed's is compared with megatron's of the same layout
FOUR = {
    "dp4_fp32_megatron": DATA,
    "dp4_fp32_zero3": (*DATA, *ENGINES["zero3"]),
    "cp2_fp32_megatron": CONTEXT,
    "cp2_fp32_zero2": (*CONTEXT, *ENGINES["zero2"]),
    "tp2_fp32_megatron": TENSOR,
    "tp2_fp32_zero2": (*TENSOR, *ENGINES["zero2"]),
    "tp2_bf16_megatron": (*TENSOR, *DENSE, *BF16),
    "tp2_bf16_zero1": (*TENSOR, *DENSE, *BF16, *ENGINES["zero1"]),
    "dp2ep2_fp32_megatron": EXPERT,
    "dp2ep2_fp32_zero1": (*EXPERT, *ENGINES["zero1"]),
    "dp2ep2_fp32_zero2": (*EXPERT, *ENGINES["zero2"]),
    "tp2ep2_bf16_megatron": (*TENSOR, *EXPERT, *BF16),
    "tp2ep2_bf16_zero1": (*TENSOR, *EXPERT, *BF16, *ENGINES["zero1"]),
    "etp1ep4_fp32_megatron": (*TENSOR, *WHOLE_EXPERTS),
    "etp1ep4_fp32_zero2": (*TENSOR, *WHOLE_EXPERTS, *ENGINES["zero2"]),
}
# The run whose checkpoint in the middle the second half starts from, and the one with whose
# settings it goes on.
HALVES = (
    ("moe_fp32_zero2", "moe_fp32_zero2"),
    ("dense_bf16_zero1", "dense_bf16_zero1"),
    ("dense_bf16_zero3", "dense_bf16_zero3"),
    ("moe_fp32_megatron", "moe_fp32_zero2"),
    ("moe_fp32_zero1", "moe_fp32_megatron"),
    ("dense_bf16_megatron", "dense_bf16_zero3"),
    ("dense_bf16_zero3_offload", "dense_bf16_megatron"),
    ("ep2_fp32_zero2", "ep2_fp32_zero2"),
    ("ep2_bf16_zero1", "ep2_bf16_zero1"),
    ("ep2_fp32_zero1", "ep2_fp32_megatron"),
    ("moe_fp32_megatron", "ep2_fp32_zero1"),
    ("dp2ep2_fp32_zero1", "moe_fp32_megatron"),  # from four processes
)


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
    this.launch(2, TWO)
    this.launch(4, FOUR)
    second = {}
    for first, then in HALVES:
        name = f"{first}_{then}"
        shutil.copytree(this[first], this[name])
        shutil.rmtree(this[name] / "checkpoints" / "step_00000004")
        second[name] = TWO[then]
    this.launch(2, second)
    return this


def assert_same(found: Path, expected: Path) -> None:
    """Losses, norms, rates and what else is measured, up to rounding."""
    rounding = 2e-3 if "bf16" in expected.name else 1e-5
    lines = [numbers(found), numbers(expected)]
    assert [line.keys() for line in lines[0]] == [line.keys() for line in lines[1]]
    for line, other in zip(*lines):
        assert line.pop("kind") == other.pop("kind")
        norms = line.pop("grad_norm", 0), other.pop("grad_norm", 0)
        assert norms[0] == pytest.approx(norms[1], rel=10 * rounding)
        assert line == pytest.approx(other, rel=rounding)


@pytest.mark.parametrize("name", [name for name in (*TWO, *FOUR) if "zero" in name])
def test_numbers_are_those_of_megatron_core(runs: Runs, name: str) -> None:
    expected = runs[name.partition("_zero")[0] + "_megatron"]
    assert min(line["grad_norm"] for line in entries(expected, "train")) > 0.5  # clipped
    assert len(losses(expected)) == 4 and len(losses(expected, "validation")) == 2
    assert_same(runs[name], expected)


@pytest.mark.parametrize(("first", "then"), HALVES)
def test_run_goes_on(runs: Runs, first: str, then: str) -> None:
    """Bit for bit with the same engine and layout, up to rounding with others."""
    name = f"{first}_{then}"
    assert "resuming after step 2, 4 steps" in runs.said[name][0].out
    if first == then:
        assert numbers(runs[name]) == numbers(runs[first])
    else:
        assert_same(runs[name], runs[then])


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
    """The same tensors as megatron-core's, in bf16 and of every stage, and whole; also those of
    experts that several ranks share, and that several hold copies of."""
    from gengram_megatron.checkpoint.stored import StoredTensors

    def tensors(name: str) -> dict:
        stored = StoredTensors(runs[name] / "checkpoints" / "step_00000004")
        return {key: (stored.shape(key), stored.dtype(key)) for key in stored.names}

    expected = {f"dense_bf16_{engine}": "dense_bf16_megatron" for engine in STAGES}
    for name, other in {**expected, "dp2ep2_fp32_zero1": "moe_fp32_megatron"}.items():
        assert tensors(name) == tensors(other)
        done = gengram("checkpoint", "verify", str(runs[name]))
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
    name = "decoder.layers.1.mlp.experts.linear_fc2.weight"
    poison = partial(broken.poison_gradient, rank=1, step=2, name=name, times=1000)
    words = runs.words("stopped", (*EXPERT, *ENGINES["zero2"]))
    ended = start_ranks(2, words, tmp_path / "said", before=poison).wait()
    assert [said.code for said in ended] == [2, 2], ended[0].err
    found = "on rank 1, the gradient of layer 2.mlp.experts.linear_fc2.weight is not finite"
    assert "step 2: loss" in ended[0].err and found in ended[0].err
