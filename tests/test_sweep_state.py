"""What a sweep reads from the folders of its runs, and what it takes for another run."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gengram_megatron.commands.cli import app
from gengram_megatron.errors import UserError
from gengram_megatron.launch.job import SLURM_FILE
from gengram_megatron.runs.folder import write_config as write_resolved
from gengram_megatron.runs.metrics import RunLog
from gengram_megatron.sweep.results import INDIFFERENT, read_state
from gengram_megatron.sweep.runs import read_sweep
from tests.training.tiny import write_config

LOSSES = {3: 1.25, 4: 1.125}
"""By steps; of the validation at the end."""
DECIDE = {
    "run.seed": "6",
    "checkpoint.load": "runs/other",
    "model.gengram.dim": "16",
    "data.path": "datasets/other",
    "optimizer.lr": "0.5",
    "optimizer.tables.lr_multiplier": "2",
    "train.micro_batch_size": "1",  # experts are balanced microbatch by microbatch
    "train.validation_samples": "4",
}
DO_NOT_DECIDE = {
    "model.gengram.split": "rows",
    "model.gengram.rows_over": "data",
    "model.gengram.project": "features",
    "data.tokenizer": "dna.model",
    "data.workers": "3",
    "optimizer.distributed": "false",
    "optimizer.overlap_grad_reduce": "true",
    "optimizer.overlap_param_gather": "true",
    "train.stop_at": "2",
    "train.deterministic": "false",
    "train.on_nan": "skip",
    "train.watchdog_seconds": "60",
    "train.recompute": "full",
    "train.validation_interval": "2",
    "logging.interval": "5",
    "checkpoint.keep": "1",
    "parallel.tensor": "2",
    "launch.processes": "2",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """A sweep whose two runs have left what finished runs leave; its file and its folder."""
    folder = tmp_path_factory.mktemp("trained")
    write_config(folder / "tiny.yaml", folder / "dna")
    file = folder / "sweep.yaml"
    file.write_text(
        "base: tiny.yaml\n"
        f"run: {{dir: {folder / 'runs'}}}\n"
        "checkpoint: {at_end: false}\n"
        f"sweep: {{grid: {{train.steps: {[*LOSSES]}}}}}\n"
    )
    for run in read_sweep(file, []).runs:
        own, steps = Path(run.config.run.dir), run.config.train.steps
        with RunLog(own, run.config, 0) as log:
            log.validation(step=steps, samples=8 * steps, tokens=512 * steps, loss=LOSSES[steps])
        write_resolved(own, run.config, 0, None)
    return file, folder / "runs"


def invoke(*words: object):
    """`gengram sweep WORDS`, cells of its table on one line."""
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["sweep", *map(str, words)])


@pytest.mark.parametrize("key", [*DECIDE, *DO_NOT_DECIDE])
def test_only_what_decides_losses_makes_another_run(trained, key: str) -> None:
    value = (DECIDE | DO_NOT_DECIDE)[key]
    for run in read_sweep(trained[0], [f"{key}={value}"]).runs:
        state = read_state(run.config, run.config.train.steps)
        assert state.changed == ([key] if key in DECIDE else [])
        assert bool(state.objection) == (key in DECIDE)


def test_every_indifferent_key_is_tried() -> None:
    assert set(DO_NOT_DECIDE) >= INDIFFERENT


def test_results_do_not_need_the_machines_of_the_runs(trained) -> None:
    file, folder = trained
    for launch in ("launch.nodes=2", "launch.processes=3"):  # no rendezvous; 8 samples over three
        for option in ("--list", "--results"):
            done = invoke(file, option, launch)
            assert done.exit_code == 0, done.exception
            assert done.output.count("finished") == 2
        written = json.loads((folder / "results.json").read_text())
        assert [row["loss"] for row in written] == [*LOSSES.values()]
        assert json.loads(invoke(file, "--json", launch).output) == written
        assert json.loads(invoke(file, "--json", "--results", launch).output) == written
        assert isinstance(invoke(file, "--launch", "--dry-run", launch).exception, UserError)


DAMAGE = {
    "of another version": ("config.yaml", "window:", "breadth:"),
    "not YAML": ("config.yaml", "run:", "["),
    "changed line": ("metrics.jsonl", '"kind"', '"kine"'),
}


@pytest.mark.parametrize("name, old, new", DAMAGE.values(), ids=DAMAGE)
def test_damage_of_one_run_stops_nothing_but_a_launch(
    trained, tmp_path: Path, name: str, old: str, new: str
) -> None:
    file, folder = trained
    shutil.copytree(folder, tmp_path / "runs")
    place, damaged = f"run.dir={tmp_path / 'runs'}", tmp_path / "runs/steps-3" / name
    damaged.write_text(damaged.read_text().replace(old, new))
    for option in ("--list", "--results"):
        done = invoke(file, option, place)
        assert done.exit_code == 0, done.exception
        first, second, why = [line for line in done.output.splitlines() if "steps-" in line][:3]
        assert "unreadable" in first and "1.2500" not in first
        assert "finished" in second and "1.1250" in second
        assert why.startswith(f"{tmp_path / 'runs/steps-3'} cannot be read ({damaged}")
    refused = str(invoke(file, "--launch", place).exception)
    assert f"steps-3 cannot be read ({damaged}" in refused
    assert "steps-4" not in refused


def test_a_damaged_checkpoint_of_one_run_hides_no_other(trained, tmp_path: Path) -> None:
    file, folder = trained
    shutil.copytree(folder, tmp_path / "runs")
    checkpoint = tmp_path / "runs/steps-3/checkpoints/step_00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "gengram.json").write_text("{")
    done = invoke(file, f"run.dir={tmp_path / 'runs'}", "checkpoint.at_end=true")
    assert done.exit_code == 0, done.exception
    first, second, why = [line for line in done.output.splitlines() if "steps-" in line]
    assert "unreadable" in first and "to do" in second
    assert f"cannot be read ({checkpoint} is not a checkpoint" in why


def test_a_line_that_a_kill_cut_counts_for_nothing(trained, tmp_path: Path) -> None:
    file, folder = trained
    shutil.copytree(folder, tmp_path / "runs")
    with (tmp_path / "runs/steps-3/metrics.jsonl").open("a") as metrics:
        metrics.write('{"kind": "train", "st')
    done = invoke(file, f"run.dir={tmp_path / 'runs'}")
    assert done.output.count("finished") == 2 and "cannot be read" not in done.output


@pytest.mark.parametrize("bad", [{"loss": math.nan}, {"loss": 1.0, "grad_norm": math.inf}])
def test_a_run_that_ended_in_a_number_that_is_not_finite_failed(trained, tmp_path, bad) -> None:
    run = read_sweep(trained[0], [f"run.dir={tmp_path}"]).runs[0]
    with RunLog(tmp_path / run.name, run.config, 0) as log:
        log.train(step=1, samples=8, tokens=512, loss=1.0, grad_norm=1.0)
        log.train(step=2, samples=16, tokens=1024, **bad)
    first, second = read_sweep(trained[0], [f"run.dir={tmp_path}"]).runs
    assert read_state(first.config, 3).failed and not read_state(second.config, 4).failed
    assert "failed" in invoke(trained[0], f"run.dir={tmp_path}").output
    skip = ("train.on_nan=skip", "train.steps=20")
    (skipped, _) = read_sweep(trained[0], [f"run.dir={tmp_path}", *skip]).runs
    assert not read_state(skipped.config, 20).failed
    with RunLog(tmp_path / run.name, run.config, 2) as log:
        for step in range(3, 12):  # ten in a row
            log.train(step=step, samples=8 * step, tokens=512 * step, **bad)
    assert read_state(skipped.config, 20).failed


def test_a_queue_that_does_not_answer_stops_a_launch_only(trained, tmp_path, monkeypatch) -> None:
    record = tmp_path / "steps-3/launches/one"
    record.mkdir(parents=True)
    (record / SLURM_FILE).write_text("17_0\n")
    (tmp_path / "squeue").write_text("#!/bin/sh\necho no controller >&2; exit 1\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    words = (trained[0], f"run.dir={tmp_path}", "launch.processes=1", "--slurm")
    assert "no controller" in str(invoke(*words, "--launch").exception)
    assert invoke(*words, "--list").output.count("to do") == 2
