"""A Slurm cluster of one node, this machine, for as long as a test needs it.

Its own folder, ports, key and socket: another Slurm of the machine is not touched. The daemons
stay in the foreground, so they are stopped by the ids of processes that were started here.
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
CPUS = 8
"""That the node says it has: tests start more processes than there are cores."""
ENDED = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED"}

CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=10
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,batch_sched_delay=0
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=tests Nodes={host} Default=YES MaxTime=INFINITE State=UP
PartitionName=short Nodes={host} MaxTime=10 State=UP
"""


def why_not() -> str | None:
    """Why this machine can have no cluster; None where it can."""
    missing = [name for name in (*DAEMONS, "sbatch", "srun") if shutil.which(name) is None]
    if missing:
        packages = "slurmctld slurmd slurm-client munge"
        return f"Slurm is not installed ({', '.join(missing)}): apt-get install {packages}"
    return None if os.geteuid() == 0 else "only root can start Slurm's daemons"


class DoesNotStart(Exception):
    """The daemons are here, but do not come up on this machine."""


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """With it, Slurm's commands talk to this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def ask(self, *words: str) -> str:
        """What one of Slurm's commands prints; it must succeed."""
        done = self._run(words)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def is_idle(self) -> bool:
        """Whether the node waits for jobs; false while the daemons start."""
        return set(self._run(("sinfo", "--noheader", "-o", "%T")).stdout.split()) == {"idle"}

    def _run(self, words: tuple[str, ...]) -> subprocess.CompletedProcess:
        environment = {**os.environ, **self.environment}
        return subprocess.run(words, env=environment, capture_output=True, text=True)

    def states(self, job: str) -> list[str]:
        """The states of a job, or of the members of an array, such as RUNNING; they are
        remembered for minutes after the end."""
        return self.ask("squeue", "--noheader", "-t", "all", "-o", "%T", "-r", "-j", job).split()

    def wait(self, job: str, seconds: float = 600) -> list[str]:
        """Until a job and all members of an array have ended for good; their last states."""
        self.until(lambda: ENDED.issuperset(self.states(job)), seconds)
        return self.states(job)

    def until(self, condition: Callable[[], bool], seconds: float = 600) -> None:
        """Until a condition holds, or TimeoutError with what the daemons say."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(self.logs())
            time.sleep(0.3)

    def logs(self) -> str:
        """The last lines of the daemons, for a failure's message."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{file.name}:\n{file.read_text()[-3000:]}" for file in files)


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Start the daemons, and stop them and what they started."""
    # Not in pytest's folder, which munge's user may not enter.
    folder = Path(tempfile.mkdtemp(prefix="gengram-slurm-", dir="/tmp"))
    folder.chmod(0o755)
    this, daemons = Cluster(folder), []
    host = socket.gethostname().split(".")[0]
    text = CONFIG.format(
        folder=folder,
        host=host,
        cpus=CPUS,
        controller_port=_free_port(),
        node_port=_free_port(),
    )
    (folder / "slurm.conf").write_text(text)
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir()
    try:
        _start_all(this, daemons)
        yield this
        this.ask("scancel", "--user=root")
        # Slurm starts processes that would outlive its daemons.
        this.until(lambda: not this.ask("squeue", "--noheader"))
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=30)
        shutil.rmtree(folder)


def _start_all(this: Cluster, daemons: list[subprocess.Popen]) -> None:
    """Add munged, slurmctld and slurmd to the daemons, each once it answers."""
    folder = this.folder
    try:
        daemons.append(_start_munge(folder / "munge"))
        this.until((folder / "munge/socket").exists, seconds=60)
        for name in ("slurmctld", "slurmd"):
            daemons.append(_start(folder, name, "-D", "-f", str(folder / "slurm.conf")))
        this.until(this.is_idle, seconds=60)
    except (OSError, LookupError) as error:  # TimeoutError among them; no user named munge
        raise DoesNotStart(f"Slurm does not start here: {error}") from None


def _start_munge(folder: Path) -> subprocess.Popen:
    """munged as its own user, which must own all it reads and writes."""
    key = folder / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    for path in (folder, key):
        shutil.chown(path, "munge", "munge")
    paths = [f"--{name}-file={folder / name}" for name in ("key", "pid", "log", "seed")]
    command = ["munged", "--foreground", f"--socket={folder / 'socket'}", *paths]
    with (folder.parent / "munged.log").open("w") as log:
        return subprocess.Popen(
            command, user="munge", group="munge", extra_groups=[], stdout=log, stderr=log
        )


def _start(folder: Path, *command: str) -> subprocess.Popen:
    with (folder / f"{command[0]}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
