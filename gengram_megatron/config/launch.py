"""The section `launch`: how many machines a run starts on, and how it starts there."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from gengram_megatron.config.keys import Name, NonNegative, Positive, Section

VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


def _as_text(value: object) -> object:
    """Converts numbers to text for keys such as `NCCL_IB_TIMEOUT: 22` and `time: 60`, which people
    write without quotes."""
    return str(value) if type(value) in (int, float) else value


Text = Annotated[str, BeforeValidator(_as_text)]
UNLIMITED = ("infinite", "unlimited")
"""Slurm's words for no time limit; letter case does not matter."""


def _time_limit(text: str) -> str:
    if text.lower() in UNLIMITED or re.fullmatch(r"([0-9]+-)?[0-9]+(:[0-9]+){0,2}", text):
        return text
    raise ValueError(
        "it must be minutes, hours:minutes:seconds, days-hours:minutes:seconds such as "
        f"2-00:00:00, {UNLIMITED[0]}, or null for the partition's default"
    )


TimeLimit = Annotated[Text, AfterValidator(_time_limit)]


class Container(Section):
    """The container that every process of a Slurm job runs in."""

    runtime: Literal["pyxis", "apptainer"] = Field(
        description="pyxis: srun --container-image; apptainer: apptainer exec"
    )
    image: Name = Field(description="name or file of the image, as the runtime expects it")
    mounts: list[Name] = Field(
        [],
        description="more folders to mount, as FOLDER or FOLDER:NAME; the current folder, run.dir, "
        "the data sets, data.tokenizer and checkpoint.load are always mounted",
    )


class Slurm(Section):
    """What `gengram launch --slurm` requests from sbatch."""

    account: Name | None = Field(None, description="account to charge; null: the user's default")
    partition: Name | None = Field(
        None, description="partition to queue in; null: the cluster's default"
    )
    qos: Name | None = Field(None, description="quality of service; null: the default")
    time: TimeLimit | None = Field(
        None,
        description="time limit of a job: minutes, days-hours:minutes:seconds, or infinite; null: "
        "the partition's default",
    )
    memory: Name | None = Field(
        None, description="RAM per node, such as 500G; null: the cluster's default"
    )
    gpus: NonNegative | None = Field(
        None, description="GPUs per node; null: one per process; 0: run on the CPU"
    )
    save_before: Positive = Field(
        300, description="how many seconds before the time limit the run is told to save and stop"
    )
    requeue: bool = Field(
        True, description="put the job back into the queue after that; it resumes when it restarts"
    )
    options: list[Name] = Field(
        [], description="further options of sbatch, such as --constraint=a100"
    )
    setup: list[Name] = Field(
        [], description="shell lines to run before the start, such as module load cuda"
    )
    virtual_environment: Name | None = Field(
        None,
        description="folder of the virtual environment to run in; null: that of the launching "
        "Python",
    )
    container: Container | None = Field(None, description="null: no container")


class Launch(Section):
    """How many machines a run starts on, and how; read by `gengram launch` and `gengram sweep`."""

    nodes: Positive = Field(1, description="number of machines")
    processes: Positive | None = Field(
        None,
        description="processes per node; null: one per GPU of this machine, or one without GPUs",
    )
    cpus: Positive | None = Field(
        None,
        description="cores per process: its threads, and what Slurm is asked for; null: what Slurm "
        "gives; without Slurm one, or all for a single process",
    )
    rendezvous: Annotated[str, Field(pattern=r"^[^\s:]+:[0-9]+$")] | None = Field(
        None,
        description="HOST:PORT of one of the nodes, to run on several without Slurm; give the same "
        "command on all of them",
    )
    environment: dict[VariableName, Text] = Field(
        {},
        description="environment variables of every process, such as NCCL_DEBUG: INFO; no secrets, "
        "because they are stored in config.yaml, launches/ and checkpoints",
    )
    slurm: Slurm = Slurm()
