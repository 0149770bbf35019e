"""Ways to break a rank from inside, each called in its process before the run starts. What is
broken is what would break: a weight, a gradient, a disk, a process; no code path is replaced."""

import ctypes
import multiprocessing
import os
import resource
import signal
import tempfile
import time
from pathlib import Path

import torch.distributed as dist

from tests.training.launch import children


def _in_step(rank: int, step: int, action) -> None:
    """Have one rank do something at the start of a step: action(its model chunk)."""
    from gengram_megatron.engine.training.run import _Run

    whole = _Run._step

    def with_action(self, number, batches):
        if (dist.get_rank(), number) == (rank, step):
            action(self.chunks[0].module)
        return whole(self, number, batches)

    _Run._step = with_action


def poison_weight(rank: int, step: int, name: str) -> None:
    """One number of a weight becomes NaN, as a memory error may make it."""

    def poison(model) -> None:
        model.get_parameter(name).data.view(-1)[0] = float("nan")

    _in_step(rank, step, poison)


def poison_gradient(rank: int, step: int, name: str, times: int) -> None:
    """A gradient becomes infinite, in so many backward passes from a step on."""

    def poison(model) -> None:
        left = [times]

        def overflow(gradient):
            left[0] -= 1
            return gradient * float("inf") if left[0] >= 0 else gradient

        model.get_parameter(name).register_hook(overflow)

    _in_step(rank, step, poison)


def hang_in_data(rank: int, sample: int) -> None:
    """A rank's disk stops answering when it reads its n-th sample."""
    from gengram_megatron.engine.data.samples import FragmentDataset

    whole, read = FragmentDataset.__getitem__, [0]

    def stuck(self, index):
        read[0] += 1
        if read[0] == sample and dist.get_rank() == rank:
            time.sleep(1000)
        return whole(self, index)

    FragmentDataset.__getitem__ = stuck


def hang_outside_python(rank: int, step: int) -> None:
    """A rank is stuck in native code that lets no other thread of Python run."""
    _in_step(rank, step, lambda model: ctypes.PyDLL(None).sleep(1000))


def kill_data_worker(rank: int, step: int) -> None:
    """The process that reads samples for a rank is killed, as for want of memory."""
    _in_step(rank, step, lambda model: os.kill(*children(os.getpid()), signal.SIGKILL))


def lengthen_tmpdir(folder: Path) -> None:
    """TMPDIR becomes so long that no name of a socket in it is allowed (108 bytes)."""
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder / ("x" * 100))
    Path(tempfile.tempdir).mkdir(exist_ok=True)
    # A forked process would go on using the folder of the one that it was forked from.
    multiprocessing.current_process()._config.pop("tempdir", None)


def kill_writer(step: int) -> None:
    """The process that writes a file of a checkpoint is killed, as for want of memory."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    whole = FileSystemWriterAsync.write_preloaded_data

    def killed(*args, write_bucket, **kwargs):
        if f"step_{step:08d}" in str(write_bucket[0]):
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, write_bucket=write_bucket, **kwargs)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(killed)


def write_elsewhere() -> None:
    """The second rank's node has a checkpoint's folder of its own: what it writes lies there, and
    the first rank looks for it for a short time."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from gengram_megatron.engine.checkpoint import state

    state.VISIBLE_SECONDS = 0.5
    whole = FileSystemWriterAsync.write_preloaded_data

    def apart(*args, write_bucket, **kwargs):
        path, *rest = write_bucket
        if Path(path).name.startswith("__1_"):
            path = Path(path).with_name(f".elsewhere_{Path(path).name}")
        return whole(*args, write_bucket=(path, *rest), **kwargs)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(apart)


def limit_file_size(size: int) -> None:
    """The disk takes no more than so many bytes of a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def signal_at(rank: int, method: str, number: signal.Signals, step: int | None = None) -> None:
    """A rank gets a signal as it enters a method of the run: `__init__`, or one that is called with
    the number of the step."""
    from gengram_megatron.engine.training.run import _Run

    whole = getattr(_Run, method)

    def with_signal(self, *args):
        if dist.get_rank() == rank and step in (None, args[0]):
            signal.raise_signal(number)
        return whole(self, *args)

    setattr(_Run, method, with_signal)
