"""Builds by several processes, builds that are cut off, and disks that are full."""

import gzip
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from io import StringIO
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from rich.console import Console

from data_prep.build import build
from data_prep.manifest import file_facts
from data_prep.progress import Display, Phase
from data_prep.schema import DataConfig
from gengram_megatron.errors import UserError
from tests.memory import peak_memory

ROOT = Path(__file__).parent.parent
SOURCES = {"human": "ab", "apes": "cdef"}


@pytest.fixture(scope="module")
def genomes(tmp_path_factory) -> Path:
    """A folder with six sources of 1.2 to 2.7 Mbp and a config, data.yaml, that uses them all."""
    folder = tmp_path_factory.mktemp("genomes")
    for number, name in enumerate("abcdef"):
        bases = np.random.default_rng(number).choice([*b"ACGT"], (20_000 + number * 5_000, 60))
        lines = [bytes(line) for line in bases.astype(np.uint8)]
        text = b">r1\n" + b"\n".join(lines[:5_000]) + b"\n>r2\n" + b"\n".join(lines[5_000:])
        (folder / f"{name}.fa").write_bytes(text)
    groups = {
        group: {"sources": {name: {"fasta": str(folder / f"{name}.fa")} for name in names}}
        for group, names in SOURCES.items()
    }
    settings = {"seq_length": 64, "reverse_complement": 0.5, "workers": 2, "groups": groups}
    (folder / "data.yaml").write_text(yaml.safe_dump({"output": "out", **settings}))
    return folder


@pytest.fixture(scope="module")
def expected(genomes) -> dict:
    """The files of the data set as one process writes them, without interruption."""
    build_here(genomes, genomes / "expected")
    return files_of(genomes / "expected")


def build_here(
    folder: Path, output: Path, report=lambda *_: None, overwrite=False, **settings
) -> None:
    values = yaml.safe_load((folder / "data.yaml").read_text()) | {"output": str(output)}
    config = DataConfig.model_validate({**values, "workers": 1, **settings})
    build(config, folder, overwrite, report)


def files_of(folder: Path) -> dict:
    return {path.name: file_facts(path) for path in folder.iterdir()}


def command(genomes: Path, *words: str) -> list[str]:
    program = "from data_prep.cli import main; main()"
    return [sys.executable, "-c", program, "build", str(genomes / "data.yaml"), *words]


def start(genomes: Path, folder: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(genomes, *words),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that a Ctrl-C of the test reaches this build alone
    )


def wait_until(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 400
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def steps_done(folder: Path) -> int:
    """How many sources were surveyed, and how many written."""
    surveys = len([*folder.glob("out.building/surveys/[!.]*.npz")])
    return surveys + len([*folder.glob("out.building/written/*.*")])


@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_workers_writes_the_same_bytes(genomes, expected, tmp_path, workers):
    build_here(genomes, tmp_path / "out", workers=workers)
    assert files_of(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_record_is_held_in_memory(tmp_path):
    lines = np.full((12_500, 81), ord("\n"), dtype=np.uint8)
    lines[:, :80] = np.random.default_rng(0).choice([*b"ACGT"], (12_500, 80))
    with (tmp_path / "one.fa").open("wb") as file:
        file.write(b">one\n")
        for _ in range(150):  # Mbp
            file.write(lines)
    groups = {"one": {"sources": {"one": {"fasta": "one.fa"}}}}
    settings = {"output": "out", "seq_length": 8192, "workers": 1, "groups": groups}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(settings))
    process = start(tmp_path, tmp_path)
    peak = 0
    while now := peak_memory(process.pid):
        peak = now
        time.sleep(0.01)
    assert process.wait() == 0 and (tmp_path / "out/manifest.json").is_file()
    assert 40e6 < peak < 180e6  # most of it Python and its libraries


@pytest.mark.parametrize("width", [60, 80, 120])
def test_what_is_shown_in_a_terminal(width, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=StringIO(), force_terminal=True, width=width, color_system=None)
    reading, writing = Phase("surveying", 10_000_000, "bytes"), Phase("writing", 4, "bases")
    ticks = iter(range(1000))
    with Display(console, clock=lambda: next(ticks)) as display:
        display.report(reading, 2_000_000)
        display.report(reading, 500_000)
        time.sleep(0.25)  # it is drawn ten times a second
        display.say("going on [1]")
        display.report(writing, 1)
    lines = re.split(r"[\r\n]|\x1b\[[0-9;?]*[A-Za-z]", console.file.getvalue())
    looked = [line.split("surveying") for line in lines if "surveying" in line]
    (shown,) = {after.lstrip(" ━╸╺") for _, after in looked if "25 %" in after}
    assert shown.split() == ["25", "%", "2", "MB/s", "0:00:03", "left"]
    assert any("writing" in line for line in lines) and "going on [1]" in map(str.strip, lines)
    assert max(map(len, lines)) <= width and "…" not in console.file.getvalue()


@pytest.mark.parametrize("dumb_terminal", [False, True])
def test_a_line_now_and_then_in_a_log(dumb_terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb" if dumb_terminal else "xterm")
    console = Console(file=StringIO(), force_terminal=dumb_terminal, width=40)
    now = 0.0
    with Display(console, clock=lambda: now) as display:
        for phase in (Phase("surveying", 100_000_000, "bytes"), Phase("writing", 50, "bases")):
            for _ in range(10):
                display.report(phase, phase.total // 10)
                now += 10
    lines = console.file.getvalue().splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["surveying:"] * 3
    assert lines[0] == "surveying: 40 %, 40.0 of 100.0 MB, 1 MB/s, 0:00:45 left"
    assert [line.split(", ")[0] for line in lines[3:]] == [
        "writing: 30 %",
        "writing: 60 %",
        "writing: 90 %",
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_each_phase_ends_at_its_total(genomes, tmp_path, workers):
    packed = tmp_path / "packed"
    packed.mkdir()
    for name in "abcdef":
        content = (genomes / f"{name}.fa").read_bytes()
        (packed / f"{name}.fa").write_bytes(gzip.compress(content, 1) if name < "d" else content)
    config = (genomes / "data.yaml").read_text().replace(str(genomes), str(packed))
    (packed / "data.yaml").write_text(config)
    done: dict[Phase, int] = {}

    def report(phase: Phase, amount: int) -> None:
        done[phase] = done.get(phase, 0) + amount

    build_here(packed, tmp_path / "out", report, workers=workers)
    build_here(packed, tmp_path / "out", report, workers=workers)  # is up to date
    sizes = sum(path.stat().st_size for path in packed.glob("*.fa"))
    bases = 60 * sum(20_000 + number * 5_000 for number in range(6))
    assert {phase.name: phase.total for phase in done if phase.name != "computing checksums"} == {
        "surveying": sizes,
        "writing": bases,
        "checking the sources": sizes,
    }
    assert all(amount == phase.total for phase, amount in done.items())
    assert len(done) == 4


def test_three_kills_at_random_places(genomes, expected, tmp_path):
    seed = random.randrange(10**6)
    print("seed", seed)  # shown if the test fails
    dice, kills = random.Random(seed), 0
    targets = sorted(dice.sample(range(1, 10), 3))
    while kills < 3:
        process = start(genomes, tmp_path)
        wait_until(lambda target=targets[kills]: steps_done(tmp_path) >= target, process)
        time.sleep(dice.random() * 0.01)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        assert not psutil.wait_procs(workers, timeout=30)[1]
        if (tmp_path / "out").exists():  # it was faster than this process, which had to wait
            assert files_of(tmp_path / "out") == expected
            shutil.rmtree(tmp_path / "out")
            continue
        kills += 1
    looked_over = len([*tmp_path.glob("out.building/surveys/[!.]*.npz")])
    process = start(genomes, tmp_path)
    shown = process.communicate(timeout=300)[1]
    assert process.returncode == 0, shown
    assert f"{looked_over} of 6 sources were surveyed" in shown
    assert files_of(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_done_is_not_done_again(genomes, expected, tmp_path):
    class Enough(Exception):
        pass

    def leave_when(step: str):
        def report(phase: Phase, amount: int) -> None:
            doing = phase.name
            seen[doing] = seen.get(doing, 0) + amount
            if doing == step and seen[doing] > 4_000_000:  # of 11.7; the first source has 2.7
                raise Enough

        return report

    for step in ("surveying", "writing"):
        seen: dict[str, int] = {}
        with pytest.raises(Enough):
            build_here(genomes, tmp_path / "out", leave_when(step))
    surveys = [path.stat().st_ino for path in tmp_path.glob("out.building/surveys/[!.]*.npz")]
    written = len([*tmp_path.glob("out.building/written/*.*")])
    assert len(surveys) == 6 and 0 < written < 6
    seen = {}
    build_here(genomes, tmp_path / "out", leave_when("never"))
    assert "surveying" not in seen
    assert files_of(tmp_path / "out") == expected


def test_a_source_that_changed_since_is_read_again(genomes, tmp_path):
    for name in "abcdef":
        (tmp_path / f"{name}.fa").write_bytes((genomes / f"{name}.fa").read_bytes())
    groups = {
        group: {"sources": {name: {"fasta": f"{name}.fa"} for name in names}}
        for group, names in SOURCES.items()
    }
    values = {"seq_length": 64, "groups": groups, "workers": 1}

    def run(output: Path, total: int | None) -> None:
        config = DataConfig.model_validate(values | {"output": str(output), "total_tokens": total})
        build(config, tmp_path, False, lambda doing, bases: None)

    with pytest.raises(UserError, match="hold fewer for the train split"):
        run(tmp_path / "out", 10**9)
    (tmp_path / "c.fa").write_bytes((genomes / "c.fa").read_bytes().replace(b"AC", b"GC"))
    run(tmp_path / "out", None)
    run(tmp_path / "fresh", None)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_an_interrupted_build_ends_at_once_and_goes_on(genomes, expected, tmp_path):
    process = start(genomes, tmp_path)
    wait_until(lambda: steps_done(tmp_path) >= 1, process)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does, to the workers too
    shown = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert shown.splitlines() == ["interrupted; run the same command again to resume"]
    assert start(genomes, tmp_path).wait(timeout=300) == 0
    assert files_of(tmp_path / "out") == expected


def test_a_worker_that_is_killed_is_a_sentence(genomes, tmp_path):
    process = start(genomes, tmp_path)
    wait_until(lambda: steps_done(tmp_path) >= 1, process)
    psutil.Process(process.pid).children()[0].kill()
    shown = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert "a worker process ended unexpectedly" in shown and "Traceback" not in shown


def test_two_builds_of_one_output_at_once(genomes, tmp_path):
    first = start(genomes, tmp_path)
    wait_until(lambda: steps_done(tmp_path) >= 1, first)  # so it holds the lock
    first.send_signal(signal.SIGSTOP)
    second = start(genomes, tmp_path)
    shown = second.communicate(timeout=400)[1]
    assert second.returncode == 2
    assert f"{tmp_path / 'out'} is being built by another process" in shown
    first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=300) == 0 and (tmp_path / "out/manifest.json").is_file()


def test_a_replacement_that_was_killed_half_way_keeps_the_old_data_set(genomes, tmp_path):
    build_here(genomes, tmp_path / "out")
    (tmp_path / "out.building").mkdir()
    (tmp_path / "out").rename(tmp_path / "out.building/replaced")
    with pytest.raises(UserError, match="hold fewer for the train split"):
        build_here(genomes, tmp_path / "out", overwrite=True, total_tokens=10**9)
    assert (tmp_path / "out/manifest.json").is_file()


def test_a_replacement_that_was_killed_half_way_does_not_go_on_unasked(genomes, tmp_path):
    """Nothing is built that could not take its place: what stood there is back, and stays."""
    build_here(genomes, tmp_path / "out")
    before = files_of(tmp_path / "out")
    (tmp_path / "out.building").mkdir()

    def not_asked(phase: Phase, amount: int) -> None:
        assert phase.name == "checking the sources"

    for settings in ({}, {"seed": 5}):
        (tmp_path / "out").rename(tmp_path / "out.building/replaced")
        with pytest.raises(UserError, match="--overwrite") if settings else nullcontext():
            build_here(genomes, tmp_path / "out", not_asked, **settings)
        assert files_of(tmp_path / "out") == before
        (tmp_path / "out.building").mkdir(exist_ok=True)


def test_a_replacement_that_was_killed_at_its_very_end(genomes, expected, tmp_path):
    build_here(genomes, tmp_path / "out")
    for folder in ("surveys", "written", "replaced/old"):
        (tmp_path / "out.building" / folder).mkdir(parents=True)
    build_here(genomes, tmp_path / "out", overwrite=True, seed=5)
    build_here(genomes, tmp_path / "out", overwrite=True)
    assert files_of(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 40 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Use up all space of a disk but `leave` bytes."""
    free = os.statvfs(folder)
    (folder / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize - leave))
    return folder / "filler"


def test_a_disk_without_enough_room(genomes, expected, small_disk):
    filler = fill(small_disk, leave=2_000_000)
    with pytest.raises(UserError, match=r"will take .* MB and its disk has .* make room"):
        build_here(genomes, small_disk / "out")
    filler.unlink()
    build_here(genomes, small_disk / "out")
    assert files_of(small_disk / "out") == expected


def test_a_disk_that_fills_up(genomes, expected, small_disk):
    def meddle(phase: Phase, amount: int) -> None:
        if phase.name == "writing" and not (small_disk / "filler").exists():
            fill(small_disk, leave=100_000)

    with pytest.raises(UserError, match="could not be written: No space left on device"):
        build_here(genomes, small_disk / "out", meddle)
    assert not (small_disk / "out").exists()
    (small_disk / "filler").unlink()
    build_here(genomes, small_disk / "out")
    assert files_of(small_disk / "out") == expected


def test_a_limit_on_the_size_of_files(genomes, expected, tmp_path):
    process = subprocess.run(
        command(genomes, "--workers", "1"),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)),
    )
    assert process.returncode == 2
    told = [line for line in process.stderr.splitlines() if line.startswith("gengram: ")]
    assert told == [f"gengram: {tmp_path / 'out'} could not be written: File too large"]
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "out").exists()
