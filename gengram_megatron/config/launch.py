"""The section `launch`: on how many machines a run starts, and how."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from gengram_megatron.config.keys import Name, NonNegative, Positive, Section

VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


def _as_text(value: object) -> object:
    """Numbers as people write them where text is wanted: NCCL_IB_TIMEOUT: 22, time: 60."""
    return str(value) if type(value) in (int, float) else value


Text = Annotated[str, BeforeValidator(_as_text)]
UNLIMITED = ("infinite", "unlimited")
"""Slurm's words for no time limit, in letters of either case."""


def _time_limit(text: str) -> str:
    if text.lower() in UNLIMITED or re.fullmatch(r"([0-9]+-)?[0-9]+(:[0-9]+){0,2}", text):
        return text
    raise ValueError(
        "it must be minutes, hours:minutes:seconds, days-hours:minutes:seconds such as "
        f"2-00:00:00, {UNLIMITED[0]}, or null for the partition's default"
    )


TimeLimit = Annotated[Text, AfterValidator(_time_limit)]


class Container(Section):
    """A container that every process of a Slurm job runs in."""

    runtime: Literal["pyxis", "apptainer"] = Field(
        description="pyxis: srun's own --container-image; apptainer: apptainer exec"
    )
    image: Name = Field(description="its name or file, as the runtime takes it")
    mounts: list[Name] = Field(
        [],
        description="folders it sees, as FOLDER or FOLDER:NAME; the current folder, run.dir, "
        "the data sets and tokenizer of data, and checkpoint.load are always among them",
    )


class Slurm(Section):
    """What `gengram launch --slurm` asks sbatch for."""

    account: Name | None = Field(None, description="null: the user's own")
    partition: Name | None = Field(None, description="null: the cluster's default")
    qos: Name | None = Field(None, description="quality of service; null: the default")
    time: TimeLimit | None = Field(
        None,
        description="limit of a job: minutes, days-hours:minutes:seconds, or infinite; null: "
        "the partition's default",
    )
    memory: Name | None = Field(None, description="of a node, such as 500G; null: the default")
    gpus: NonNegative | None = Field(
        None, description="of a node; null: one a process; 0: the run computes on the CPU"
    )
    save_before: Positive = Field(
        300, description="seconds before the time limit at which the run is told to save and stop"
    )
    requeue: bool = Field(
        True, description="back into the queue after that, and on from what was saved"
    )
    options: list[Name] = Field([], description="more of sbatch's, such as --constraint=a100")
    setup: list[Name] = Field(
        [], description="lines of shell before the start, such as module load cuda"
    )
    virtual_environment: Name | None = Field(
        None, description="folder of the one to run in; null: the Python that launches"
    )
    container: Container | None = Field(None, description="null: none")


class Launch(Section):
    """On how many machines a run starts, and how; read by `gengram launch` and `sweep`."""

    nodes: Positive = Field(1, description="machines")
    processes: Positive | None = Field(
        None, description="of each node; null: one for each GPU of this machine, or else one"
    )
    cpus: Positive | None = Field(
        None,
        description="cores of each process: its threads, and what Slurm is asked for; null: what "
        "Slurm gives; elsewhere one, or all for a process on its own",
    )
    rendezvous: Annotated[str, Field(pattern=r"^[^\s:]+:[0-9]+$")] | None = Field(
        None,
        description="HOST:PORT of one of several nodes without Slurm; the same command is given "
        "on all of them",
    )
    environment: dict[VariableName, Text] = Field(
        {},
        description="variables of every process, such as NCCL_DEBUG: INFO; no secrets, as they are "
        "kept in config.yaml, launches/ and checkpoints",
    )
    slurm: Slurm = Slurm()
