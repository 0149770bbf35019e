"""Requests to stop that come while a run, or the next run of a sweep, is being started."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gengram_megatron.commands import sweep as start
from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.launch.job import check_job
from gengram_megatron.launch.stop import StopRequests
from gengram_megatron.signals import REQUEUE, STOP_SIGNALS
from tests.layouts.launch import ROOT
from tests.training.tiny import build_data, environment, write_config

HEAD = """
import os, signal, sys, threading
from gengram_megatron.commands.cli import main
from gengram_megatron.launch import local
from gengram_megatron.commands import launch as command

def request():
    os.kill(os.getpid(), signal.{name})

def then(function, act):
    def both(*words, **named):
        result = function(*words, **named)
        act()
        return result
    return both

"""
MOMENTS = {
    "while the start is recorded": "command.write_record = then(command.write_record, request)",
    "while torch is imported": """
class Finder:
    def find_spec(name, *_):
        if name == "torch.distributed.run":
            request()
sys.meta_path.insert(0, Finder)
""",
    "while it waits for the other node": """
import torch.distributed.run as torchrun
def later():
    threading.Timer(1, request).start()
torchrun.parse_args = then(torchrun.parse_args, later)
""",
    "after the first of the ranks": """
import torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler as handler
handler.Popen = then(handler.Popen, request)
""",
}
"""Programs that ask for a stop at that moment of a `gengram launch`."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    data = build_data(tmp_path_factory.getbasetemp() / "dna_64")
    return write_config(tmp_path_factory.mktemp("stop") / "tiny.yaml", data)


def launched(moment: str, number: signal.Signals, tiny: Path, run: Path) -> tuple[int, str]:
    """The exit code of a launch that is told to stop at a moment, and what it said."""
    words = ["launch", str(tiny), f"run.dir={run}", "--nproc", "2"]
    if "node" in moment:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            rendezvous = f"127.0.0.1:{probe.getsockname()[1]}"
        words += [f"launch.rendezvous={rendezvous}", "--nodes", "2"]
    program = HEAD.format(name=number.name) + MOMENTS[moment] + "\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "number"),
    [
        pytest.param(*case, marks=pytest.mark.thorough) if "first of the ranks" in case[0] else case
        for case in zip(MOMENTS, (signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGTERM))
    ],
    ids=str,
)
def test_request_while_a_run_starts(
    tiny: Path, tmp_path: Path, moment: str, number: signal.Signals
) -> None:
    code, said = launched(moment, number, tiny, tmp_path / "run")
    assert code == REQUEUE, said
    assert "Traceback" not in said and "the same command continues" in said
    assert "saved and stopped" not in said
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_interrupt_while_the_commands_are_imported() -> None:
    program = """
import os, signal, sys
class Finder:
    def find_spec(name, *_):
        if name == "gengram_megatron.commands.cli":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
from gengram_megatron.__main__ import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program, "launch", "none.yaml"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.fixture
def handlers():
    """Put back afterwards: a process that was asked to stop keeps its handlers."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_first_interrupt_after_another_request_ends_nothing(capfd) -> None:
    with StopRequests() as requests:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert requests.received and not requests.at_once
    assert "again to end immediately" in capfd.readouterr().err


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("moment", ["at the end of the first", "while the second is recorded"])
@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_request_between_the_runs_of_a_sweep(
    tiny: Path, tmp_path: Path, monkeypatch, moment: str, number: signal.Signals
) -> None:
    jobs = [
        check_job(load_config(tiny, [f"run.dir={tmp_path / name}"], Config), name, for_slurm=False)
        for name in ("first", "second")
    ]
    trained, run_here = [], start.run_here

    def run(job, requests) -> int:
        if job is jobs[1]:
            return run_here(job, requests)
        trained.append(job)
        if moment == "at the end of the first":
            signal.raise_signal(number)
        return 0

    def record(job) -> None:
        if job is jobs[1]:
            signal.raise_signal(number)

    monkeypatch.setattr(start, "run_here", run)
    monkeypatch.setattr(start, "write_record", record)
    assert start.run_in_turn(jobs) == REQUEUE
    assert trained == jobs[:1] and not (tmp_path / "second/metrics.jsonl").exists()
