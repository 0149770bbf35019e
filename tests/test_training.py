"""Training as a user sees it: commands, and what they leave in the run's folder."""

import math
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from tests.layouts.launch import ROOT
from tests.training.jobs import ALONE, FOUR, MODELS, RECOMPUTED, SHORT, TWO
from tests.training.launch import Ended, python, run_jobs
from tests.training.tiny import (
    build_data,
    entries,
    environment,
    losses,
    numbers,
    write_config,
    write_few,
)

# All runs are made in the fixture, which counts as part of the first test.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


@dataclass(frozen=True)
class Runs:
    """Where all the runs lie, and what each rank of each command said."""

    folder: Path
    config: Path
    said: dict[str, list[Ended]]

    def __getitem__(self, name: str) -> Path:
        return self.folder / name

    def words(self, name: str, settings: tuple[str, ...]) -> list[str]:
        settings = [word.replace("FOLDER", str(self.folder)) for word in settings]
        return ["train", str(self.config), f"run.dir={self[name]}", *settings]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """All jobs, in one launch for each number of processes."""
    folder = tmp_path_factory.mktemp("training")
    write_few(folder / "few")
    data = build_data(tmp_path_factory.getbasetemp() / "dna_64")
    this = Runs(folder, write_config(folder / "tiny.yaml", data), {})
    for processes, jobs in ((1, ALONE), (2, TWO), (4, FOUR)):
        commands = {name: this.words(name, settings) for name, settings in jobs.items()}
        this.said.update(run_jobs(processes, commands, folder / f"jobs_{processes}"))
    return this


def test_every_job_ended_well(runs: Runs) -> None:
    for name, ranks in runs.said.items():
        expected = 2 if name == "no_data" else 0
        assert [rank.code for rank in ranks] == [expected] * len(ranks), (name, ranks[0].err)
        assert name == "no_data" or not any(rank.err for rank in ranks), (name, ranks[0].err)
        assert not any(rank.out for rank in ranks[1:]), name  # the first rank speaks for all


# What a model learns


@pytest.mark.parametrize("name", [*MODELS, *(f"{name}_bf16" for name in RECOMPUTED)])
def test_every_kind_of_model_learns(runs: Runs, name: str) -> None:
    loss = losses(runs[name])
    assert len(loss) == 6
    assert loss[0] > math.log(32) - 0.3  # knows nothing
    assert loss[-1] < 1.9
    assert all(0 < e["grad_norm"] < 100 for e in entries(runs[name], "train"))


@pytest.mark.parametrize("name", RECOMPUTED)
def test_bf16_follows_fp32(runs: Runs, name: str) -> None:
    assert losses(runs[f"{name}_bf16"]) == pytest.approx(losses(runs[name]), rel=0.02)
    assert losses(runs[f"{name}_bf16"]) != losses(runs[name])


@pytest.mark.parametrize("name", RECOMPUTED)
def test_full_recomputation_changes_no_bit(runs: Runs, name: str) -> None:
    assert numbers(runs[f"{name}_full"]) == numbers(runs[name])


@pytest.mark.parametrize("name", RECOMPUTED)
def test_selective_recomputation_changes_no_more_than_rounding(runs: Runs, name: str) -> None:
    """It adds up the gradients of a tensor with two uses in another order."""
    loss = losses(runs[f"{name}_selective"])
    assert loss[0] == losses(runs[name])[0]
    assert loss == pytest.approx(losses(runs[name]), rel=1e-5)


def test_a_run_that_learns_nothing_says_so_once_and_at_its_end(runs: Runs) -> None:
    (said,) = runs.said["stuck"]
    lines = said.out.splitlines()
    warnings = [
        (line, number) for number, line in enumerate(lines) if "optimizer.lr (1e-09)" in line
    ]
    assert len(warnings) == 2
    (first, number), (last, _) = warnings
    assert first.startswith("warning: step 100: ") and lines[number - 1].startswith("step 100/101")
    assert last == lines[-1] and last.startswith("warning: this job ends")
    others = {name: ranks[0].out for name, ranks in runs.said.items() if name != "stuck"}
    assert not [name for name, out in others.items() if "model.init_std" in out]


# What a layout must not change

LAYOUTS = [name for name, words in {**TWO, **FOUR}.items() if words[: len(SHORT)] == SHORT]


@pytest.mark.parametrize("name", LAYOUTS)
def test_distributed_optimizer_gives_the_losses_of_one_process(runs: Runs, name: str) -> None:
    assert losses(runs[name]) == pytest.approx(losses(runs["alone"]), rel=1e-5)
    assert losses(runs[name], "validation") == pytest.approx(
        losses(runs["alone"], "validation"), rel=1e-5
    )
    norms = [[e["grad_norm"] for e in entries(runs[run], "train")] for run in (name, "alone")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_hashed_tables_of_2_24_rows_shared_by_two_ranks(runs: Runs) -> None:
    trained = entries(runs["dp2_2_24_rows"], "train")
    assert len(trained) == 3
    assert all(math.isfinite(e["loss"]) for e in trained)
    assert trained[-1]["loss"] < trained[0]["loss"]
    # A step has 512 tokens, so at most as many 12-mers, each in two heads.
    assert all(512 < e["rows_touched"] <= 2 * 512 + 5 for e in trained)


@pytest.mark.parametrize("name", ["dp2_initial", "pp2_initial"])
def test_validation_loss_does_not_depend_on_the_layout(runs: Runs, name: str) -> None:
    one, other = (losses(runs[run], "validation") for run in ("initial", name))
    assert len(one) == 1
    assert other == pytest.approx(one, rel=1e-6)


def test_validation_leaves_no_trace_in_training(runs: Runs) -> None:
    assert numbers(runs["alone"], "train") == numbers(runs["not_validated"], "train")
    assert len(entries(runs["alone"], "validation")) == 2
    last = [numbers(runs[run], "validation")[-1] for run in ("alone", "not_validated")]
    assert last[0] == last[1]


# The schedule


def rate(samples: int, total: int, peak: float, least: float) -> float:
    """The learning rate of a step that begins after so many samples."""
    warmup, decay = round(0.25 * total), round(0.75 * total)
    if samples <= warmup:
        return peak * samples / warmup
    if samples > decay:
        return least
    done = (samples - warmup) / (decay - warmup)
    return least + (peak - least) * (1 + math.cos(math.pi * done)) / 2


def test_learning_rate_follows_the_formula(runs: Runs) -> None:
    rates = [entry["lr"] for entry in entries(runs["schedule"], "train")]
    assert rates == pytest.approx([rate(4 * step, 40, 0.01, 0.001) for step in range(10)])
    assert rates[0] == 0 and rates[-1] == 0.001 and max(rates) > 0.0095


def test_changed_schedule_counts_from_the_step_that_it_was_changed_at(runs: Runs) -> None:
    rates = [entry["lr"] for entry in entries(runs["changed"], "train")]
    expected = [rate(4 * step, 40, 0.01, 0.001) for step in range(4)]
    expected += [rate(4 * step, 48, 0.02, 0.001) for step in range(4, 12)]
    assert rates == pytest.approx(expected)


def test_warm_up_may_last_as_long_as_the_run(runs: Runs) -> None:
    rates = [entry["lr"] for entry in entries(runs["only_warmup"], "train")]
    assert rates == pytest.approx([0, 0.005])


# What lies in the folder


def test_folder_holds_what_the_design_says(runs: Runs) -> None:
    run = runs["alone"]
    names = {"config.yaml", "metrics.jsonl", "checkpoints", "tensorboard", "loss.png", ".lock"}
    assert {path.name for path in run.iterdir()} == names
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000004"]
    assert [path.name for path in (run / "tensorboard").glob("events.out.*")]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_metrics_have_their_keys(runs: Runs) -> None:
    place = {"kind", "step", "samples", "tokens", "loss", "bits_per_base"}
    measured = {"grad_norm", "lr", "tokens_per_second", "seconds", "data_wait"}
    balance, memory = {"load_balance_loss", "router_z_loss"}, {"rows_touched"}
    for entry in entries(runs["alone"], "train"):
        assert entry.keys() == place | measured | balance | memory
        assert entry["load_balance_loss"] == pytest.approx(1, abs=0.6)
        assert entry["samples"] == 8 * entry["step"] and entry["tokens"] == 64 * entry["samples"]
        assert entry["bits_per_base"] == pytest.approx(entry["loss"] / math.log(2))
    for entry in entries(runs["dense_mha"], "train"):
        assert entry.keys() == place | measured | memory
    for entry in entries(runs["alone"], "validation"):
        assert entry.keys() == place


def test_config_reloads_to_the_same_config(runs: Runs) -> None:
    words = runs.words("alone", ALONE["alone"])[2:]
    given = load_config(runs.config, words, Config)
    assert load_config(runs["alone"] / "config.yaml", [], Config) == given


def test_config_of_the_first_part_is_kept_when_a_run_goes_on_with_another(runs: Runs) -> None:
    kept = load_config(runs["changed"] / "config.until-step-4.yaml", [], Config)
    assert (kept.optimizer.lr, kept.train.steps, kept.train.stop_at) == (0.01, 10, 4)
    now = load_config(runs["changed"] / "config.yaml", [], Config)
    assert (now.optimizer.lr, now.train.steps, now.train.stop_at) == (0.02, 12, None)
    (said,) = runs.said["changed_on"]
    told = [line for line in said.out.splitlines() if line.endswith(" since step 4")]
    assert told == [
        "optimizer.lr 0.01 -> 0.02 since step 4",
        "train.steps 10 -> 12 since step 4",
        "train.stop_at 4 -> null since step 4",
    ]
    assert len([*runs["changed"].glob("config*.yaml")]) == 2


def test_stopped_run_goes_on_bit_for_bit(runs: Runs) -> None:
    """Without the distributed optimizer, and with rates of their own for the tables."""
    assert numbers(runs["cut"], "train") == numbers(runs["alone"], "train")
    assert numbers(runs["cut"], "validation") == numbers(runs["alone"], "validation")
    assert "starting, until step 2 of 4" in runs.said["cut"][0].out
    assert "resuming after step 2, 4 steps" in runs.said["cut_on"][0].out


# What cannot run


def test_missing_data_set_is_told_in_one_sentence(runs: Runs) -> None:
    (said,) = runs.said["no_data"]
    assert said.err == (
        "gengram: data.path: there is no folder /nowhere/dna; `gengram-data build` makes it\n"
    )
    assert not said.out and not runs["no_data"].exists()


@pytest.mark.thorough
def test_missing_data_set_is_told_once_by_many_processes(runs: Runs, tmp_path) -> None:
    words = ["train", str(runs.config), f"run.dir={tmp_path / 'run'}", "data.path=/nowhere/dna"]
    done = subprocess.run(
        [*python(2), "-m", "gengram_megatron", *words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0  # torchrun's own, 1 for any failure
    assert done.stderr.count("there is no folder /nowhere/dna") == 1
    assert "exitcode  : 2" in done.stderr  # that of a rank, as torchrun tells it
    assert not (tmp_path / "run").exists()
