"""`gengram launch`: what it would do, what it keeps, and torchrun on this machine."""

import json
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from gengram_megatron.commands.cli import app
from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.errors import EXIT_CODE, NOT_FINITE, UserError
from gengram_megatron.launch.job import check_job, seconds
from gengram_megatron.launch.slurm import script
from gengram_megatron.signals import REQUEUE, STOP_SIGNALS
from tests.layouts.launch import ROOT
from tests.training.at_start import BROKEN, MENDABLE
from tests.training.launch import NAMELESS, gengram, start, wait_for
from tests.training.tiny import RUN, build_data, environment, numbers, write_config

FULL = {
    "nodes": 2,
    "processes": 2,
    "cpus": 6,
    "environment": {"NCCL_DEBUG": "INFO", "NCCL_IB_TIMEOUT": 22, "NOTE": "two words"},
    "slurm": {
        "account": "dna",
        "partition": "long",
        "qos": "high",
        "time": "1-12:00:00",
        "memory": "500G",
        "save_before": 120,
        "options": ["--constraint=a100"],
        "setup": ["module load cuda"],
        "virtual_environment": "/opt/gengram",
    },
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    data = build_data(tmp_path_factory.getbasetemp() / "dna_64")
    return write_config(tmp_path_factory.mktemp("launch") / "tiny.yaml", data)


def written(folder: Path, launch: dict) -> str:
    """A config file with such a section `launch`, whose run lies in the folder beside it."""
    file = folder / "run.yaml"
    run = {**RUN["run"], "dir": str(folder / "the run")}
    data = {"path": str(folder / "dna")}
    file.write_text(yaml.safe_dump({**RUN, "run": run, "data": data, "launch": launch}))
    return str(file)


def dry_run(*words: str) -> str:
    """What `gengram launch --dry-run` prints."""
    done = CliRunner().invoke(app, ["launch", *words, "--dry-run"])
    assert done.exit_code == 0, done.exception
    return done.output


def refused(*words: str) -> str:
    """Why `gengram launch` does not start."""
    done = CliRunner().invoke(app, ["launch", *words])
    assert isinstance(done.exception, UserError)
    return str(done.exception)


def asked_for(script: str) -> set[str]:
    """The options in the head of a script for sbatch, without those of paths."""
    found = {line.removeprefix("#SBATCH ") for line in script.splitlines() if "#SBATCH" in line}
    return {option for option in found if "/" not in option}


def test_script_asks_for_what_the_config_says(tmp_path: Path) -> None:
    file = written(tmp_path, FULL)
    script = dry_run(file, "--slurm")
    assert asked_for(script) == {
        "'--job-name=the run'",
        "--nodes=2",
        "--ntasks-per-node=2",
        "--gres=gpu:2",
        "--cpus-per-task=6",
        "--account=dna",
        "--partition=long",
        "--qos=high",
        "--time=1-12:00:00",
        "--mem=500G",
        "--signal=USR1@120",
        "--requeue",
        "--open-mode=append",
        "--constraint=a100",
    }
    for line in (
        "export NCCL_DEBUG=INFO",
        "export NCCL_IB_TIMEOUT=22",
        "export NOTE='two words'",
        "export OMP_NUM_THREADS=6",
        "module load cuda",
        "source /opt/gengram/bin/activate",
        '  scontrol requeue "$SLURM_JOB_ID"',
    ):
        assert line in script.splitlines()
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in script
    assert "--cpus-per-task=6 python -m gengram_megatron.commands.rank" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert not (tmp_path / "the run").exists()  # a dry run leaves nothing


@pytest.mark.parametrize(
    "setting",
    ["parallel.tensor=2", "parallel.context=2", "optimizer.overlap_grad_reduce=true"],
)
def test_one_connection_where_megatron_needs_it(tmp_path: Path, setting: str) -> None:
    file = written(tmp_path, {"processes": 2})
    script = dry_run(file, setting, "--slurm", "launch.slurm.gpus=0")
    assert "export CUDA_DEVICE_MAX_CONNECTIONS=1\n" in script
    assert "gres" not in script
    own = "launch.environment={CUDA_DEVICE_MAX_CONNECTIONS: 8}"
    assert "CONNECTIONS=8" in dry_run(file, setting, own)


@pytest.mark.parametrize(
    ("runtime", "command"),
    [
        (
            "pyxis",
            '--container-image=gengram.sqsh --container-mounts="$run:$run",{here}:{here},'
            "{data}:{data},/scratch:/s --container-workdir={here} python -m",
        ),
        (
            "apptainer",
            'apptainer exec --nv --bind "$run:$run",{here}:{here},{data}:{data},/scratch:/s '
            "--pwd {here} gengram.sqsh python -m",
        ),
    ],
)
def test_container_sees_the_run_its_data_and_the_current_folder(
    tmp_path: Path, runtime: str, command: str
) -> None:
    container = {"runtime": runtime, "image": "gengram.sqsh", "mounts": ["/scratch:/s"]}
    file = written(tmp_path, {"processes": 4, "slurm": {"container": container}})
    assert command.format(here=Path.cwd(), data=tmp_path / "dna") in dry_run(file, "--slurm")


def test_container_sees_all_that_a_run_reads(tmp_path: Path) -> None:
    container = {"runtime": "apptainer", "image": "gengram.sif"}
    file = written(tmp_path, {"processes": 4, "slurm": {"container": container}})
    script = dry_run(
        file,
        "data={path: null, blend: [{path: /a, weight: 1}, {path: b, weight: 2}], tokenizer: /t}",
        "checkpoint.load=/old/run",
        "--slurm",
    )
    here = Path.cwd()
    mounts = ["$run:$run", f"{here}:{here}", "/a:/a", f"{here}/b:{here}/b", "/t:/t"]
    mounts.append("/old/run:/old/run")
    bound = shlex.split(script)[shlex.split(script).index("--bind") + 1]
    assert bound.split(",") == mounts


def test_container_of_an_array_sees_the_data_of_all_its_runs(tmp_path: Path) -> None:
    container = {"runtime": "apptainer", "image": "gengram.sif"}
    file = Path(written(tmp_path, {"processes": 1, "slurm": {"container": container}}))
    jobs = [
        check_job(load_config(file, [f"data.path={path}"], Config), path[1:], for_slurm=True)
        for path in ("/a", "/b")
    ]
    assert f"{Path.cwd()},/a:/a,/b:/b --pwd" in script(jobs, tmp_path)


def test_torchrun_on_several_nodes(tmp_path: Path) -> None:
    file = written(tmp_path, {"rendezvous": "node1:29500"})
    said = dry_run(file, "--nodes", "2", "--nproc", "2")
    assert "OMP_NUM_THREADS=1 torchrun --nnodes=2 --nproc-per-node=2 --rdzv-backend=c10d" in said
    assert "--rdzv-endpoint=node1:29500" in said
    assert not (tmp_path / "the run").exists()


def test_what_does_not_fit_is_refused_before_the_start(tmp_path: Path) -> None:
    file = written(tmp_path, {})
    assert "2 * 3" in refused(file, "--nproc", "3")
    assert "give --nproc" in refused(file, "--slurm")
    assert "launch.rendezvous is null" in refused(file, "--nodes", "2")
    assert "launch.slurm.time is the text 'a day'" in refused(file, "launch.slurm.time=a day")
    assert "launch.environment.X is true" in refused(file, "launch.environment={X: true}")
    assert not (tmp_path / "the run").exists()


@pytest.mark.parametrize(
    ("limit", "wanted"),
    [
        ("90", 5400),
        ("2:30", 150),
        ("1:02:03", 3723),
        ("2-3", 183_600),
        ("2-3:04", 183_840),
        ("2-3:04:05", 183_845),
        ("infinite", math.inf),
        ("UNLIMITED", math.inf),
    ],
)
def test_time_limits_are_read_as_slurm_does(limit: str, wanted: float) -> None:
    assert seconds(limit) == wanted


def test_time_limit_that_leaves_no_time_to_train(tmp_path: Path) -> None:
    words = (written(tmp_path, {"processes": 2}), "--slurm", "launch.slurm.save_before=240")
    assert "as soon as it starts" in refused(*words, "launch.slurm.time=5")
    assert "--signal=USR1@240" in dry_run(*words, "launch.slurm.time=6")
    assert "--time=infinite" in dry_run(*words, "launch.slurm.time=infinite")


def test_names_that_do_not_resolve(tmp_path: Path, monkeypatch) -> None:
    words = (written(tmp_path, {}), "--nproc", "2", "--nodes", "2")
    said = refused(*words, "launch.rendezvous=no-such-host.invalid:29500")
    assert "launch.rendezvous is no-such-host.invalid:29500" in said
    monkeypatch.setattr(socket, "getfqdn", lambda: "no-such-host.invalid")
    said = refused(*words, "launch.rendezvous=127.0.0.1:29500")
    assert "its own name no-such-host.invalid" in said
    assert not (tmp_path / "the run").exists()


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "dna").mkdir()
    (tmp_path / "the run").write_text("a file")
    assert "cannot be created" in refused(written(tmp_path, {}), "--nproc", "2")


def test_data_set_of_a_slurm_job_is_looked_at_first(
    tiny: Path, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    run = tmp_path / "run"
    words = (str(tiny), "--slurm", "--nproc", "2", f"run.dir={run}")
    assert f"data.path: there is no folder {Path.cwd()}/none" in refused(*words, "data.path=none")
    blend = "data={path: null, blend: [{path: /none, weight: 1}]}"
    assert "data.blend entry 1.path: there is no folder /none" in refused(*words, blend)
    assert f"data.path: {tmp_path} is not a data set" in refused(*words, f"data.path={tmp_path}")
    assert "have 64 bases and model.seq_length is 32" in refused(*words, "model.seq_length=32")
    assert not run.exists()
    staged = "launch.slurm.setup=[cp -r data /scratch]"  # nothing of the node is known here
    assert "sbatch refused" in refused(*words, staged, "data.path=/scratch/data")


def test_sbatch_must_be_there(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "sbatch was not found" in refused(written(tmp_path, {}), "--slurm", "--nproc", "2")
    assert not (tmp_path / "the run").exists()


class Runs:
    """The same run on two processes: of two nodes that meet by rendezvous, and of one node, where
    it was told to stop and started again."""

    def __init__(self, folder: Path, tiny: Path):
        self.folder, self.tiny = folder, tiny
        self.nodes, self.cut = folder / "nodes", folder / "cut"

    def start(self, run: Path, name: str, *words: str) -> tuple[subprocess.Popen, Path]:
        """`gengram launch` in the background, and where it says what it does."""
        output = self.folder / f"{name}.log"
        common = [f"run.dir={run}", "train.steps=8", "launch.processes=1"]
        return start(1, ["launch", str(self.tiny), *common, *words], output), output

    def on_two_nodes(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words = ("launch.nodes=2", f"launch.rendezvous=127.0.0.1:{port}")
        started = [self.start(self.nodes, f"node{number}", *words) for number in (0, 1)]
        for process, output in started:
            assert process.wait(300) == 0, output.read_text()

    def on_one_node(self, name: str, stop_after: int | None = None) -> int:
        process, output = self.start(self.cut, name, "--nproc", "2")
        if stop_after is not None:
            lines = self.cut / "metrics.jsonl"
            wait_for(
                lambda: lines.exists() and len(lines.read_text().splitlines()) >= stop_after,
                process,
                output,
            )
            process.send_signal(signal.SIGINT)
        return process.wait(300)


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory) -> Runs:
    this = Runs(tmp_path_factory.mktemp("launched"), tiny)
    this.on_two_nodes()
    return this


@pytest.mark.slow
def test_stopped_and_started_again_as_if_never_stopped(runs: Runs) -> None:
    assert runs.on_one_node("first", stop_after=2) == 75
    assert len(numbers(runs.cut, "train")) < 8
    assert "saved and stopped" in (runs.folder / "first.log").read_text()
    assert runs.on_one_node("second") == 0
    assert "resuming after step" in (runs.folder / "second.log").read_text()
    assert numbers(runs.cut) == numbers(runs.nodes)


@pytest.mark.thorough
@pytest.mark.slow
def test_second_interrupt_ends_the_run_at_once(runs: Runs) -> None:
    run = runs.folder / "at_once"
    # A step that takes longer than the time between the two.
    process, output = runs.start(run, "at_once", "train.global_batch_size=512")
    wait_for(lambda: (run / "metrics.jsonl").exists(), process, output)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(1)  # signals of one kind that come together are one
    assert process.wait(300) == 75, output.read_text()
    assert "without saving" in output.read_text()


@pytest.mark.slow
def test_logs_and_what_is_kept_of_a_start(runs: Runs) -> None:
    logs = [log.name for log in runs.nodes.glob("logs/*/rank-*.log")]
    assert sorted(logs) == ["rank-0.log", "rank-1.log"]  # each in the folder of its node
    records = [*(runs.nodes / "launches").iterdir()]
    assert len(records) == 2
    for record in records:
        assert (record / "config.yaml").read_text() == (runs.nodes / "config.yaml").read_text()
        assert load_config(record / "config.yaml", [], Config).train.steps == 8
        assert f"torch=={version('torch')}" in (record / "packages.txt").read_text().splitlines()
        environment = json.loads((record / "environment.json").read_text())
        assert environment["PYTHONPATH"] == str(ROOT)
        code = json.loads((record / "code.json").read_text())
        assert code["version"] == version("gengram-megatron")
        assert "train.steps=8" in code["command"]


def test_commit_and_changes_of_a_checkout(tmp_path: Path) -> None:
    """In a checkout of its own, as this one's may or may not have changes."""
    shutil.copytree(ROOT / "gengram_megatron", tmp_path / "gengram_megatron")
    shutil.copy(ROOT / ".gitignore", tmp_path)  # Python may write what it compiled

    def git(*words: str) -> str:
        user = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
        command = ["git", "-C", str(tmp_path), *user, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def kept() -> tuple[dict, str]:
        program = "from gengram_megatron.launch.job import code_version as v; import json; "
        program += "a, b = v(); print(json.dumps([a, b.decode()]))"
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True)
        return json.loads(done.stdout)

    git("init")
    assert "commit" not in kept()[0]  # a folder of somebody else's repository
    git("add", ".gitignore", "gengram_megatron/*.py", "gengram_megatron/*.md")
    git("commit", "-m", "all")
    code, diff = kept()
    assert (code["commit"], diff) == (git("rev-parse", "HEAD").strip(), "")
    with (tmp_path / "gengram_megatron/errors.py").open("a") as file:
        file.write("CHANGED = True\n")
    code, diff = kept()
    assert code["changed"] == [" M gengram_megatron/errors.py"]
    assert "+CHANGED = True" in diff


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=str)
def test_signal_while_modules_are_imported_is_kept(
    tiny: Path, tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "rank.log"
    words = [str(tmp_path), "train", str(tiny), f"run.dir={tmp_path / 'run'}"]
    with output.open("w") as file:
        rank = subprocess.Popen(
            [sys.executable, "-m", "gengram_megatron.commands.rank", *words],
            env=environment(), cwd=ROOT, stdout=file, stderr=file,
        )  # fmt: skip
    wait_for(lambda: blocked(rank.pid) >= set(STOP_SIGNALS), rank, output)
    rank.send_signal(number)
    assert rank.wait(300) == REQUEUE, output.read_text()
    assert "nothing to save after step 0" in output.read_text()
    assert not (tmp_path / "run").exists()


def blocked(process: int) -> set[int]:
    """The signals that a process holds back."""
    status = Path(f"/proc/{process}/status").read_text()
    mask = int(status.split("SigBlk:")[1].split()[0], 16)
    return {number for number in range(1, 64) if mask >> (number - 1) & 1}


@pytest.mark.slow
def test_first_rank_that_failed_is_named_with_its_error(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    words = ("launch", str(tiny), "--nproc", "2", f"run.dir={tmp_path / 'run'}")
    done = gengram(*words, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.code == 1
    assert "rank 1 of 2 failed first: RuntimeError: the disk is gone" in done.err
    log = Path(done.err.splitlines()[-1].removeprefix("its log: "))
    assert log.name == "rank-1.log" and "the disk is gone" in log.read_text()


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "code"), [("UserError", EXIT_CODE), ("NotFinite", NOT_FINITE)])
def test_what_a_rank_says_itself_is_told(tiny: Path, tmp_path: Path, kind: str, code: int) -> None:
    """On a machine whose own name does not resolve, which one node does not need."""
    (tmp_path / "sitecustomize.py").write_text(MENDABLE.replace("UserError", kind))
    words = ("launch", str(tiny), "--nproc", "2", f"run.dir={tmp_path / 'run'}")
    before = () if subprocess.run([*NAMELESS, "true"]).returncode else NAMELESS
    done = gengram(*words, before=before, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.code == code
    assert done.err.splitlines()[-1] == "gengram: the disk is gone"
    assert "the disk is gone" not in done.out and "failed first" not in done.err


def test_mistake_is_told_once(tiny: Path, tmp_path: Path) -> None:
    run = f"run.dir={tmp_path / 'run'}"
    done = gengram("launch", str(tiny), "--nproc", "2", run, "data.path=/nowhere")
    assert done.code == 2
    assert (done.out + done.err).count("there is no folder /nowhere") == 1
    assert "failed first" not in done.err
