"""Runs a job, or an array of jobs, on Slurm: writes the script, calls sbatch, and asks Slurm for
partitions and for jobs in the queue.

srun starts a process for each rank. Before the time limit Slurm sends SIGUSR1 to all of them; they
save and exit with REQUEUE, and the script puts its job back into the queue. A run resumes from its
folder automatically, so the script keeps no state.
"""

import os
import shutil
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from shlex import quote

from gengram_megatron.config.launch import UNLIMITED, Slurm
from gengram_megatron.config.schema import Config
from gengram_megatron.data_set import data_sets, no_data_set, other_seq_length, read_manifest
from gengram_megatron.errors import UserError
from gengram_megatron.launch.job import RANK_MODULE, SLURM_FILE, Job, seconds, write_record
from gengram_megatron.signals import REQUEUE

SECONDS = 30
"""Time limit of a request to Slurm."""


def partition_problems(slurm: Slurm) -> Iterator[str]:
    """Yields a sentence for each reason why the partition cannot run a job. sbatch also refuses
    unknown names, but it queues a job whose time limit is too long, where it stays forever."""
    limits = _partitions()
    if not limits:  # Slurm does not list them here
        return
    names = slurm.partition.split(",") if slurm.partition else [n for n in limits if n[-1] == "*"]
    limits = {name.rstrip("*"): limit for name, limit in limits.items()}
    names = [name.rstrip("*") for name in names]
    for name in names:
        if name not in limits:
            yield (
                f"launch.slurm.partition is {slurm.partition}, but this cluster has no partition "
                f"{name}; it has {', '.join(sorted(limits))}"
            )
            return
    longest = max((seconds(limits[name]) for name in names), default=float("inf"))
    # A quality of service may allow more than the partition does.
    if slurm.time is not None and slurm.qos is None and seconds(slurm.time) > longest:
        allowed = " and ".join(f"{name} allows {limits[name]}" for name in names)
        yield (
            f"launch.slurm.time is {slurm.time}, but the partition {allowed}: the job would wait "
            "forever; lower it, or give another launch.slurm.partition"
        )


def _partitions() -> dict[str, str]:
    """Returns the time limit of each partition by its name; the default partition's name ends in *.
    It is empty if Slurm gives no answer."""
    done = _ask("sinfo", "--all", "--noheader", "-o", "%P %l")
    limits = dict(line.split() for line in done.stdout.splitlines()) if done.returncode == 0 else {}
    return {name: UNLIMITED[0] if limit == "n/a" else limit for name, limit in limits.items()}


def recorded_job(run: Path) -> str | None:
    """Returns the Slurm job number of the newest start of a run that was submitted to Slurm, such
    as 17, or 17_2 in an array. Returns None if no start was."""
    files = [*run.glob(f"launches/*/{SLURM_FILE}")]
    newest = max(files, key=lambda file: file.stat().st_mtime_ns, default=None)
    return newest.read_text().strip() if newest else None


def queue_states(runs: list[Config]) -> dict[str, str]:
    """Returns the state of each run in Slurm's queue, such as PENDING or RUNNING, by its run.dir.

    Raises UserError if Slurm does not answer, for example because its controller is down.
    """
    numbers = {one.run.dir: number for one in runs if (number := recorded_job(Path(one.run.dir)))}
    if not numbers or shutil.which("squeue") is None:
        return {}
    jobs = ",".join(sorted({number.partition("_")[0] for number in numbers.values()}))
    done = _ask(
        *("squeue", "--noheader", "--array", f"--user={os.getuid()}", f"--jobs={jobs}"),
        *("-o", "%i %T"),
    )
    # Slurm forgets a job minutes after its end.
    if done.returncode and "Invalid job id" not in done.stderr:
        raise UserError(
            "squeue does not report which runs are in the queue already "
            f"({' '.join(done.stderr.split())}): try again when Slurm answers"
        )
    states = dict(line.split() for line in done.stdout.splitlines())
    return {run: states[number] for run, number in numbers.items() if number in states}


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs one of Slurm's commands. A command that is missing or hangs counts as failed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


SRUN_WAIT_SECONDS = 60
"""Once a rank has ended, the others have this many seconds to end by themselves."""


class Template(string.Template):
    """A template of a shell script, with @ for placeholders because the shell uses $."""

    delimiter = "@"


BODY = Template("""\
#!/bin/bash
@options

runs=(
@runs
)
run=${runs[${SLURM_ARRAY_TASK_ID:-0}]}
logs=$run/logs/job-$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
mkdir -p "$logs"
echo "logs of the ranks: $logs"

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
@setup
srun --kill-on-bad-exit=0 --wait=@wait --output="$logs/rank-%t.log" @command
code=$?

if [ $code -eq @saved ]; then
  echo "saved and stopped, as requested"
  @requeue
elif [ $code -ne 0 ]; then
  first=$(ls -tr "$logs"/*.error.json 2>/dev/null | head -n 1)
  if [ -n "$first" ]; then
    why=$(sed 's/^{"message": {"message": "\\(.*\\)", "extraInfo".*/\\1/' "$first")
    echo "gengram: $(basename "$first" .error.json) failed first: $why"
    echo "its log: ${first%.error.json}.log"
  else
    tail -n 5 "$logs/rank-0.log"
  fi
fi
exit $code
""")


def script(jobs: list[Job], output: Path, at_a_time: int | None = None) -> str:
    """Returns the script of a job, or of an array of jobs that differ only in their runs.

    Args:
        output: folder for the output of the script itself.
        at_a_time: how many members of an array may run at the same time; None: all.
    """
    job = jobs[0]
    if len(jobs) > 1:
        options = [f"--job-name={job.run.parent.name}", f"--output={output / 'job-%A_%a.log'}"]
        options.append(f"--array=0-{len(jobs) - 1}" + (f"%{at_a_time}" if at_a_time else ""))
    else:
        options = [f"--job-name={job.run.name}", f"--output={output / 'job-%j.log'}"]
    options += _options(job)
    return BODY.substitute(
        options="\n".join(f"#SBATCH {quote(option)}" for option in options),
        runs="\n".join(f"  {quote(str(one.run))}" for one in jobs),
        setup="".join(f"{line}\n" for line in _setup(job)),
        command=_command(jobs),
        wait=SRUN_WAIT_SECONDS,
        saved=REQUEUE,
        requeue='scontrol requeue "$SLURM_JOB_ID"' if job.config.launch.slurm.requeue else ":",
    )


def submit(jobs: list[Job], folder: Path, at_a_time: int | None = None) -> str:
    """Writes the records of jobs, and job.sh to a folder, and submits it with sbatch.

    Returns the job number.
    """
    if shutil.which("sbatch") is None:
        raise UserError("sbatch was not found: --slurm only works on a machine of a Slurm cluster")
    _check_before_submission(jobs)
    for job in jobs:
        write_record(job)
    output = jobs[0].run / "logs" if len(jobs) == 1 else folder
    for directory in (folder, output):
        directory.mkdir(parents=True, exist_ok=True)
    file = folder / "job.sh"
    file.write_text(script(jobs, output, at_a_time))
    done = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"sbatch refused {file}: {' '.join(done.stderr.split())}")
    number = done.stdout.strip().split(";")[0]
    for index, job in enumerate(jobs):
        job.slurm_file.write_text(f"{number}_{index}\n" if len(jobs) > 1 else f"{number}\n")
    return number


def _check_before_submission(jobs: list[Job]) -> None:
    """Raises UserError with all problems that can be found on the login node, so that a job does
    not wait for hours and then fail."""
    problems = [problem for job in jobs for problem in partition_problems(job.config.launch.slurm)]
    for job in jobs:
        if not job.config.launch.slurm.setup:  # which may put a data set on the node's own disk
            problems += _data_problems(job.config)
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))


def _data_problems(config: Config) -> Iterator[str]:
    for key, path in data_sets(config).items():
        folder = Path(path)
        if not folder.is_dir():
            yield no_data_set(key, folder)
            continue
        try:
            seq_length = read_manifest(folder)["settings"]["seq_length"]
        except UserError as error:
            yield f"{key}: {error}"
            continue
        if seq_length != config.model.seq_length:
            yield other_seq_length(key, folder, seq_length, config.model.seq_length)


def _options(job: Job) -> Iterator[str]:
    """Yields sbatch's options that do not depend on the number of jobs."""
    launch, slurm = job.config.launch, job.config.launch.slurm
    yield f"--nodes={launch.nodes}"
    yield f"--ntasks-per-node={job.processes}"
    gpus = job.processes if slurm.gpus is None else slurm.gpus
    if gpus:
        yield f"--gres=gpu:{gpus}"
    wanted = {
        "cpus-per-task": launch.cpus,
        "mem": slurm.memory,
        "account": slurm.account,
        "partition": slurm.partition,
        "qos": slurm.qos,
        "time": slurm.time,
    }
    yield from (f"--{name}={value}" for name, value in wanted.items() if value is not None)
    # With "B:" before USR1, only the script would get the signal, and not the ranks.
    yield f"--signal=USR1@{slurm.save_before}"
    yield "--requeue" if slurm.requeue else "--no-requeue"
    yield "--open-mode=append"  # a requeued job continues in the same file
    yield f"--chdir={Path.cwd()}"
    yield from slurm.options


def _setup(job: Job) -> Iterator[str]:
    """Yields the shell lines before the start."""
    slurm = job.config.launch.slurm
    for name, value in job.environment.items():
        yield f"export {name}={quote(value)}"
    yield from slurm.setup
    if slurm.virtual_environment is not None:
        yield f"source {quote(str(Path(slurm.virtual_environment).absolute() / 'bin/activate'))}"


def _command(jobs: list[Job]) -> str:
    """Returns the command that srun starts for each rank. It uses the shell's $run and $logs."""
    job, launch = jobs[0], jobs[0].config.launch
    has_own_python = launch.slurm.virtual_environment or launch.slurm.container
    words = [*_container(jobs), "python" if has_own_python else quote(sys.executable)]
    if launch.cpus is not None:  # srun does not inherit it from sbatch
        words.insert(0, f"--cpus-per-task={launch.cpus}")
    config = job.config_file.relative_to(job.run)
    words += ["-m", RANK_MODULE, '"$logs"', "train", f'"$run"/{quote(str(config))}']
    return " ".join(words)


def _container(jobs: list[Job]) -> list[str]:
    """Returns the arguments that run a command in the container; empty without a container."""
    slurm = jobs[0].config.launch.slurm
    container = slurm.container
    if container is None:
        return []
    here, image = str(Path.cwd()), quote(container.image)
    read = (str(Path(path).absolute()) for job in jobs for path in _read(job.config))
    pairs = [f"{path}:{path}" for path in dict.fromkeys([here, *read])] + container.mounts
    mounts = ",".join(['"$run:$run"', *map(quote, pairs)])
    if container.runtime == "pyxis":
        return [
            f"--container-image={image}",
            f"--container-mounts={mounts}",
            f"--container-workdir={quote(here)}",
        ]
    gpus = [] if slurm.gpus == 0 else ["--nv"]
    return ["apptainer", "exec", *gpus, "--bind", mounts, "--pwd", quote(here), image]


def _read(config: Config) -> Iterator[str]:
    """Yields the files and folders that a run reads besides its own folder."""
    data = config.data
    yield from [part.path for part in data.blend or []]
    yield from filter(None, (data.path, data.tokenizer, config.checkpoint.load))
