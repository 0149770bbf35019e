"""Files that cannot be used, and output that nobody reads: a sentence and a code, no traceback."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gengram_megatron.errors import READER_GONE, UserError, explain, run_program
from gengram_megatron.files import check_writable, replacing
from tests.built_sets import random_fragments, write_set
from tests.layouts.launch import ROOT
from tests.training.tiny import environment, write_config

UNREADABLE = "/proc/self/mem"
"""A file whose reading fails, for root too."""


def run(module: str, *words: str | Path, **streams) -> subprocess.CompletedProcess:
    streams = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "env": environment(),
        **streams,
    }
    command = [sys.executable, "-m", module, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, text=True, timeout=120, **streams)


def sentence(done: subprocess.CompletedProcess) -> str:
    """The only line that a command said, which ended with the code of a mistake."""
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("gengram: "), done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("errors") / "data"
    return write_set(folder, random_fragments(4, 64, 1), random_fragments(2, 64, 2))


@pytest.mark.parametrize("words", [["config", "--keys"], ["plan", "--help"]], ids=" ".join)
def test_a_reader_that_goes_away_is_no_error(words):
    read, write = os.pipe()
    os.close(read)
    done = run("gengram_megatron", *words, stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (READER_GONE, "")


@pytest.mark.parametrize("buffered", [False, True])
def test_output_that_cannot_be_written_is_said(buffered):
    with open("/dev/full", "w") as full:
        variables = {**environment(), "PYTHONUNBUFFERED": "" if buffered else "1"}
        done = run("gengram_megatron", "--version", stdout=full, env=variables)
        assert "output" in sentence(done)


def test_config_files_that_cannot_be_read(tmp_path):
    not_text = tmp_path / "latin1.yaml"
    not_text.write_bytes("run: {dir: é}".encode("latin-1"))
    for path in (tmp_path, not_text, UNREADABLE, not_text / "below.yaml"):
        assert str(path) in sentence(run("gengram_megatron", "config", path))


def test_a_manifest_that_cannot_be_read(data, tmp_path):
    (tmp_path / "manifest.json").symlink_to(UNREADABLE)
    assert str(tmp_path / "manifest.json") in sentence(run("data_prep", "inspect", tmp_path))


@pytest.mark.parametrize("where", ["folder.png", "file/below.png", "missing/below.png"])
def test_a_report_is_refused_before_the_data_set_is_read(data, tmp_path, where):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    done = run("data_prep", "inspect", data, "--report", tmp_path / where)
    assert done.stdout == ""
    assert str(tmp_path / where) in sentence(done)


def test_results_of_a_sweep_that_cannot_be_written(tmp_path, data):
    config = write_config(tmp_path / "sweep.yaml", data)
    config.write_text(config.read_text() + "sweep: {grid: {run.seed: [1, 2]}}\n")
    (tmp_path / "runs/results.csv").mkdir(parents=True)
    words = ["sweep", config, "--results", f"run.dir={tmp_path / 'runs'}"]
    assert str(tmp_path / "runs/results.csv") in sentence(run("gengram_megatron", *words))
    words = ["launch", config, f"run.dir={config}/below"]
    config.write_text(config.read_text().partition("sweep:")[0])
    assert f"{config}/below" in sentence(run("gengram_megatron", *words))


def ended(error: BaseException, capsys) -> tuple[int, str]:
    def program() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        run_program(program)
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.ENOENT])
def test_errors_that_name_a_file_are_sentences(number, capsys):
    code, said = ended(OSError(number, os.strerror(number), "a/file"), capsys)
    assert code == 2 and said.startswith("gengram: a/file ") and said.count("\n") == 1


def test_a_full_disk_is_a_sentence(capsys):
    assert ended(OSError(errno.ENOSPC, "full"), capsys)[0] == 2


def test_errors_of_the_program_keep_their_traceback():
    for error in (OSError(errno.EINVAL, "invalid"), ConnectionResetError(), BrokenPipeError()):
        assert explain(error) is None
        with pytest.raises(type(error)):
            run_program(lambda error=error: (_ for _ in ()).throw(error))


def test_a_file_is_named_and_not_the_one_beside_it(tmp_path):
    (tmp_path / "file").write_text("")
    wanted = tmp_path / "file" / "results.csv"
    with pytest.raises(NotADirectoryError) as error, replacing(wanted) as beside:
        beside.write_text("")
    assert error.value.filename == str(wanted)
    (tmp_path / "folder").mkdir()
    for path in (wanted, tmp_path / "folder"):
        with pytest.raises(UserError, match=str(path)):
            check_writable(path, "--out")


def test_reader_that_leaves_a_progress_line_ends_the_program_quietly() -> None:
    """rich, which prints it, puts another file in the place of standard output first."""
    program = (
        "from gengram_megatron.errors import run_program\n"
        "from gengram_megatron.runs.progress import Progress\n"
        "def lines():\n"
        "    progress = Progress(10**6, 1)\n"
        "    while True:\n"
        "        progress.say('a line ' * 100)\n"
        "run_program(lines)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        process.stdout.readline()
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (READER_GONE, b"")
