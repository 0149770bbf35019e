"""A rank that computes nonsense, and one that hangs: the job ends, and says which one and where."""

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest

from gengram_megatron.engine.training.watchdog import HUNG, Report, Watchdog
from gengram_megatron.errors import EXIT_CODE, NOT_FINITE
from tests.training import broken
from tests.training.faults import STEPS, Lab
from tests.training.tiny import entries, numbers

WEIGHT = "decoder.layers.2.mlp.router.weight"


@pytest.mark.parametrize(
    ("name", "poison", "found"),
    [
        ("weight", broken.poison_weight, "the weight layer 3.mlp.router.weight"),
        (
            "gradient",
            partial(broken.poison_gradient, times=1000),
            "the gradient of layer 3.mlp.router.weight",
        ),
    ],
)
def test_nan_on_one_rank_stops_all_and_is_traced(lab: Lab, name, poison, found) -> None:
    ended = lab.start(name, before=partial(poison, rank=1, step=6, name=WEIGHT)).wait()
    assert [said.code for said in ended] == [NOT_FINITE, NOT_FINITE], ended[0].err
    assert "resumes from step_00000004;" in ended[0].err
    assert f"gradient norm nan: on rank 1, {found} is not finite" in ended[0].err
    assert "step 6: loss" in ended[0].err and len(ended[0].err.splitlines()) == 1
    assert lab.checkpoints(name) == [4]


def test_nan_batch_is_left_out_and_counted(lab: Lab) -> None:
    # Two passes of the rank: the step has two microbatches on each.
    poison = partial(broken.poison_gradient, rank=1, step=6, name=WEIGHT, times=2)
    ended = lab.start("skip", "train.on_nan=skip", before=poison).wait()
    assert [said.code for said in ended] == [0, 0], ended[0].err
    assert "warning: step 6: loss" in ended[0].out and "train.on_nan" in ended[0].out
    lines, whole = entries(lab.run("skip"), "train"), entries(lab.run("whole"), "train")
    assert [line["skipped"] for line in lines] == [int(s == 6) for s in range(1, STEPS + 1)]
    losses = [[line["loss"] for line in run] for run in (lines, whole)]
    assert losses[0][:6] == losses[1][:6]  # that of step 6 is from before the weights are changed
    assert losses[0][6] != losses[1][6]
    rates = [[line["lr"] for line in run] for run in (lines, whole)]
    assert rates[0] == [*rates[1][:6], *rates[1][5:-1]]  # the schedule waits for the next batch
    assert losses[0][-1] == pytest.approx(losses[1][-1], rel=0.05)


def test_batches_are_not_left_out_for_ever(lab: Lab) -> None:
    """From the first on, so that there is nothing to save when a checkpoint is due."""
    poison = partial(broken.poison_gradient, rank=1, step=1, name=WEIGHT, times=1000)
    overlap = ("optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true")
    ended = lab.start("hopeless", "train.on_nan=skip", *overlap, before=poison).wait()
    assert [said.code for said in ended] == [NOT_FINITE, NOT_FINITE], ended[0].err
    assert "nothing was saved yet" in ended[0].err and "resumes" not in ended[0].err
    assert "step 10: loss" in ended[0].err  # ten in a row
    assert "warning: no batch has changed a weight yet, so there is nothing" in ended[0].out
    assert lab.checkpoints("hopeless") == []
    assert "on rank 1, the gradient of layer 3.mlp.router.weight is not finite" in ended[0].err


def test_killed_data_worker_ends_the_run_with_the_reason(lab: Lab) -> None:
    killed = partial(broken.kill_data_worker, rank=1, step=6)
    ended = lab.start("reader", "checkpoint.asynchronous=false", before=killed).wait(60)
    assert ended[1].code == EXIT_CODE and ended[0].code not in (0, None), ended
    (line,) = ended[1].err.splitlines()
    assert "rank 1: " in line and "data.workers" in line and "killed by signal" in line
    assert lab.checkpoints("reader") == [4] and not (lab.run("reader") / "stacks").exists()


def test_data_workers_need_no_socket_in_tmpdir(lab: Lab, tmp_path) -> None:
    long = partial(broken.lengthen_tmpdir, tmp_path)
    ended = lab.start("tmpdir", "train.stop_at=2", before=long).wait(60)
    assert [said.code for said in ended] == [0, 0], ended[0].err
    assert numbers(lab.run("tmpdir"), "train") == numbers(lab.run("whole"), "train")[:2]


SECONDS = "train.watchdog_seconds=6"


def test_rank_that_hangs_is_named_and_all_stacks_are_kept(lab: Lab) -> None:
    # Five reads a step: its four samples, and the first sample of all, for its length.
    stuck = partial(broken.hang_in_data, rank=1, sample=28)
    at_once = ("data.workers=0", "checkpoint.asynchronous=false")
    ended = lab.start("stuck", SECONDS, *at_once, before=stuck).wait()
    assert [said.code for said in ended] == [HUNG, HUNG], ended[0].err
    assert "no progress for 6 seconds (train.watchdog_seconds): " in ended[0].err
    assert "rank 1 hangs in step 6, reading data; the stacks" in ended[0].err
    assert not ended[1].err
    (stacks,) = (lab.run("stuck") / "stacks").iterdir()
    assert "finish_grad_sync" in (stacks / "rank_0.txt").read_text()
    assert "in stuck" in (stacks / "rank_1.txt").read_text()
    assert lab.checkpoints("stuck") == [4]


@pytest.mark.thorough
def test_rank_that_hangs_outside_python_is_named_too(lab: Lab) -> None:
    stuck = partial(broken.hang_outside_python, rank=1, step=6)
    ended = lab.start("native", SECONDS, before=stuck).wait()
    assert [said.code for said in ended] == [HUNG, 1], ended[0].err
    assert "rank 1 gave no sign of life" in ended[0].err
    assert "Timeout (0:00:16" in ended[1].err and "in with_action" in ended[1].err


@pytest.mark.parametrize(
    ("marks", "waits", "named"),
    [
        ((7, 5, 6), (True, True, False), "rank 1 hangs in step 3, computing"),  # behind
        ((5, 5, 5), (True, True, False), "rank 2 hangs in step 3, computing"),  # waits for none
        ((5, 5, None), (True, True, True), "rank 2 gave no sign of life"),
    ],
)
def test_who_is_named(tmp_path, marks, waits, named) -> None:
    """By reports as three ranks write them."""
    for rank, (count, waiting) in enumerate(zip(marks, waits, strict=True)):
        if count is not None:
            report = Report(rank=rank, step=3, doing="computing", marks=count, waits=waiting)
            (tmp_path / f"rank_{rank}.txt").write_text(json.dumps(asdict(report)) + "\nstack\n")
    watchdog = Watchdog(5, tmp_path, rank=0, ranks=3)
    assert named in watchdog.verdict(watchdog.reports())


def test_watchdog_needs_no_stderr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python sets both to None where it was closed, as by 2>&- in a shell."""
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "__stderr__", None)
    with Watchdog(600, tmp_path, rank=0, ranks=1) as watchdog:
        watchdog.mark(1, "computing")


def test_watchdog_lets_a_run_be_that_goes_on(lab: Lab) -> None:
    """The unbroken run has one, with the default."""
    assert len(numbers(lab.run("whole"), "train")) == STEPS
    assert not (lab.run("whole") / "stacks").exists()
