"""train.engine deepspeed trains as megatron-core's engine does, up to rounding; saves, and goes on
bit for bit; and each engine goes on from the other's checkpoints."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from gengram_megatron.errors import NOT_FINITE
from tests.training import broken
from tests.training.deepspeed_jobs import Job
from tests.training.deepspeed_jobs import run as run_jobs
from tests.training.launch import Ended, gengram
from tests.training.tiny import DENSE, build_data, entries, losses, numbers, write_config

# All runs are made in the fixture, which counts as part of the first test.
pytestmark = [pytest.mark.slow, pytest.mark.thorough, pytest.mark.timeout(2400)]

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
    "ep2_fp32": ("zero1", "zero2", "zero2_offload"),
    "ep2_bf16": ("megatron", "zero1"),
}
TWO = {
    f"{model}_{engine}": (*MODELS[model], *ENGINES[engine])
    for model, engines in RUNS.items()
    for engine in engines
}
DATA, CONTEXT = (), ("parallel.context=2",)
# With a bias, whose gradient is added up over the ranks that share a sequence.
TENSOR = ("parallel.tensor=2", "model.gengram.projection_bias=true")
WHOLE_EXPERTS = ("parallel.expert=4", "parallel.expert_tensor=1")
#   name: settings
FOUR = {
    "dp4_fp32_megatron": DATA,
    "dp4_fp32_zero3": (*DATA, *ENGINES["zero3"]),
    "cp2_fp32_megatron": CONTEXT,
    "cp2_fp32_zero2": (*CONTEXT, *ENGINES["zero2"]),
    "tp2_fp32_megatron": TENSOR,
    "tp2_fp32_zero2": (*TENSOR, *ENGINES["zero2"]),
    "tp2_bf16_megatron": (*TENSOR, *DENSE, *BF16),
    "tp2_bf16_zero1": (*TENSOR, *DENSE, *BF16, *ENGINES["zero1"]),
    "dp2ep2_fp32_zero1": (*EXPERT, *ENGINES["zero1"]),
    "dp2ep2_fp32_zero2": (*EXPERT, *ENGINES["zero2"]),
    "tp2ep2_bf16_megatron": (*TENSOR, *EXPERT, *BF16),
    "tp2ep2_bf16_zero1": (*TENSOR, *EXPERT, *BF16, *ENGINES["zero1"]),
    "etp1ep4_fp32_zero2": (*TENSOR, *WHOLE_EXPERTS, *ENGINES["zero2"]),
}
# Each of DeepSpeed's runs is compared with megatron-core's of its own name or of one of these:
# experts on other ranks change no number.
COMPARED = {
    "ep2_fp32": "moe_fp32",
    "dp2ep2_fp32": "dp4_fp32",
    "etp1ep4_fp32": "tp2_fp32",
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
    ("moe_fp32_megatron", "ep2_fp32_zero1"),
    ("dp2ep2_fp32_zero2", "dp2ep2_fp32_zero2"),
    ("dp2ep2_fp32_zero1", "dp4_fp32_megatron"),
)
# The tensors of the first are those of the second.
SAME_FORM = {f"dense_bf16_{engine}": "dense_bf16_megatron" for engine in STAGES}
SAME_FORM["dp2ep2_fp32_zero1"] = "moe_fp32_zero1"
# Layer 2's, in the model that DeepSpeed is given; in bf16 it is wrapped.
FC2, ROUTER, EXPERTS = (
    f"decoder.layers.1.mlp.{name}.weight" for name in ("linear_fc2", "router", "experts.linear_fc2")
)
# The run that is broken, and where its gradient becomes infinite in the second step.
BROKEN = {"dense_bf16_zero1": f"module.{FC2}", "moe_fp32_zero3": ROUTER}


@dataclass(frozen=True)
class Runs:
    """Where all the runs lie, and what each rank of each job said."""

    folder: Path
    config: Path
    said: dict[str, list[Ended]]

    def __getitem__(self, name: str) -> Path:
        return self.folder / name

    def words(self, command: str, name: str, settings: tuple[str, ...]) -> list[str]:
        return [command, str(self.config), f"run.dir={self[name]}", *COMMON, *settings]

    def train(self, name: str, like: str, *settings: str, **others) -> Job:
        """A run with the settings of one of the above, and more."""
        words = self.words("train", name, (*(TWO | FOUR)[like], *settings))
        return Job(words, processes=4 if like in FOUR else 2, **others)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """Whole runs, each of two steps and two more, on two and on four processes; the second half
    once more with the same engine or another; broken runs; and what commands say of them."""
    folder = tmp_path_factory.mktemp("deepspeed")
    data = build_data(tmp_path_factory.getbasetemp() / "dna_64")
    this = Runs(folder, write_config(folder / "tiny.yaml", data), {})
    jobs = {name: this.train(name, name) for name in (*TWO, *FOUR)}
    for first, then in HALVES:
        name = f"{first}_{then}"
        jobs[name] = this.train(name, then, half_of=this[first])
    for name, weight in BROKEN.items():
        poison = partial(broken.poison_gradient, rank=1, step=2, name=weight, times=2)
        jobs[f"skip_{name}"] = this.train(f"skip_{name}", name, "train.on_nan=skip", broken=poison)
    poison = partial(broken.poison_gradient, rank=1, step=2, name=EXPERTS, times=1000)
    jobs["stopped"] = this.train("stopped", "ep2_fp32_zero2", broken=poison)
    for name in SAME_FORM:
        jobs[f"verify_{name}"] = Job(["checkpoint", "verify", str(this[name])], processes=1)
    examined = this.words("doctor", "examined", ENGINES["zero2"])
    jobs["doctor"] = Job([*examined, "--no-speeds", "--json"], processes=1)
    this.said.update(run_jobs(jobs, folder, folder / "jobs"))
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
    like = name.partition("_zero")[0]
    expected = runs[COMPARED.get(like, like) + "_megatron"]
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
    assert "AdamW, Adam in host memory, " in said[0]
    assert "AdamW, weights and Adam in host memory, " in said[1]


def test_checkpoint_has_the_common_form(runs: Runs) -> None:
    """The same tensors as megatron-core's, in bf16 and of every stage, and whole; also with experts
    that two of four ranks hold copies of."""
    from gengram_megatron.engine.checkpoint.stored import StoredTensors

    def tensors(name: str) -> dict:
        stored = StoredTensors(runs[name] / "checkpoints" / "step_00000004")
        return {key: (stored.shape(key), stored.dtype(key)) for key in stored.names}

    for name, other in SAME_FORM.items():
        assert tensors(name) == tensors(other)
        (done,) = runs.said[f"verify_{name}"]
        assert done.code == 0, done.err


def test_what_deepspeed_does_not_take_is_told_in_a_sentence(runs: Runs) -> None:
    extra = "train.deepspeed.extra={zero_optimization: {nonsense: 1}}"
    done = gengram(*runs.words("train", "nonsense", (*ENGINES["zero1"], extra)))
    assert (done.code, done.out) == (2, "")
    (sentence,) = done.err.splitlines()
    assert "change train.deepspeed.extra" in sentence and "nonsense" in sentence


def test_doctor_says_so(runs: Runs) -> None:
    (done,) = runs.said["doctor"]
    found = json.loads(done.out)
    assert (done.code, found["problems"]) == (0, [])
    assert " ZeRO 2 with torch AdamW" in found["parts"]["optimizer"]["uses"]
    assert found["parts"]["optimizer"]["why"].startswith("train.engine is deepspeed")


@pytest.mark.parametrize("name", BROKEN)
def test_nan_batch_is_left_out(runs: Runs, name: str) -> None:
    ended = runs.said[f"skip_{name}"]
    assert [said.code for said in ended] == [0, 0], ended[0].err
    lines, whole = (entries(runs[run], "train") for run in (f"skip_{name}", name))
    assert [line["skipped"] for line in lines] == [0, 1, 0, 0]
    # The first step has a rate of 0, so the third is computed with the weights of the start.
    assert [line["loss"] for line in lines[:2]] == [line["loss"] for line in whole[:2]]
    assert lines[2]["loss"] > 1.2 * whole[2]["loss"]
    assert lines[3]["loss"] < 0.9 * lines[2]["loss"]


def test_nan_stops_the_run_and_is_traced(runs: Runs) -> None:
    ended = runs.said["stopped"]
    assert [said.code for said in ended] == [NOT_FINITE, NOT_FINITE], ended[0].err
    found = "on rank 1, the gradient of layer 2.mlp.experts.linear_fc2.weight is not finite"
    assert "step 2: loss" in ended[0].err and found in ended[0].err
