"""Microbatches: the same samples a step in every layout, from any place, with or without
processes; and what is input, label and loss."""

import errno
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gengram_megatron.engine.data import batches
from gengram_megatron.engine.data.batches import BatchStream, reporting_dead_workers, split_batch
from gengram_megatron.engine.data.samples import SampleOrder
from gengram_megatron.errors import RankError, UserError
from gengram_megatron.tokenizer import EOD
from tests.layouts.launch import ROOT
from tests.training.tiny import environment


class Numbered:
    """Sample i holds i as two base-200 digits and an EOD, so a batch tells who is in it."""

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        if not 0 <= index < 1000:
            raise IndexError(index)
        return np.array([index // 200, index % 200, EOD], dtype=np.uint8)


class InSequence:
    """An order in which position i is sample i."""

    def samples_at(self, positions: np.ndarray) -> np.ndarray:
        return positions


def samples_of(microbatch: torch.Tensor) -> list[int]:
    return [int(row[0]) * 200 + int(row[1]) for row in microbatch]


def read(order, steps, *, consumed=0, total=None, batch=8, micro=1, ranks=1, workers=0):
    """The sample numbers of each step: a list of microbatches for each rank."""
    streams = [
        BatchStream(
            Numbered(),
            order,
            consumed=consumed,
            total=total,
            global_batch_size=batch,
            micro_batch_size=micro,
            data_rank=rank,
            data_size=ranks,
            workers=workers,
        )
        for rank in range(ranks)
    ]
    try:
        return [
            [[samples_of(microbatch) for microbatch in next(stream)] for stream in streams]
            for _ in range(steps)
        ]
    finally:
        for stream in streams:
            stream.close()


def flat(step) -> list[int]:
    """Samples of one step in the order of positions: microbatch by microbatch, rank by rank."""
    return [sample for microbatch in zip(*step) for rank in microbatch for sample in rank]


@given(
    micro=st.integers(1, 4),
    ranks=st.integers(1, 4),
    accumulation=st.integers(1, 4),
    consumed=st.integers(0, 5000),
)
@settings(deadline=None, max_examples=60)
def test_a_step_holds_the_same_samples_in_every_layout(micro, ranks, accumulation, consumed):
    batch, order = micro * ranks * accumulation, SampleOrder(1000, 7)
    steps = read(order, 3, consumed=consumed, batch=batch, micro=micro, ranks=ranks)
    expected = order.samples_at(consumed + np.arange(3 * batch)).tolist()
    assert [sample for step in steps for sample in flat(step)] == expected


@given(cut=st.integers(0, 6), micro=st.sampled_from([1, 2, 4]), ranks=st.sampled_from([1, 2]))
@settings(deadline=None, max_examples=20)
def test_resuming_goes_on_where_the_run_was_cut_in_another_layout(cut, micro, ranks):
    order = SampleOrder(1000, 7)
    whole = [flat(step) for step in read(order, 6)]
    resumed = read(order, 6 - cut, consumed=cut * 8, micro=micro, ranks=ranks)
    assert whole[cut:] == [flat(step) for step in resumed]


def test_processes_read_the_same():
    order = SampleOrder(1000, 7)
    assert read(order, 4, micro=2, ranks=2, workers=2) == read(order, 4, micro=2, ranks=2)


READ = """
import torch
from tests.test_batches import read
from gengram_megatron.engine.data.samples import SampleOrder
order = SampleOrder(1000, 7)
assert read(order, 4, batch=80000, workers=2) == read(order, 4, batch=80000)
"""
SMALL = (
    "unshare",
    "-m",
    "sh",
    "-c",
    'mount -t tmpfs -o size=200k tmpfs /dev/shm && exec "$@"',
    "sh",
)
"""Gives a command a /dev/shm that holds semaphores and no step of 80,000 samples."""


def may_mount() -> bool:
    return shutil.which("unshare") and not subprocess.run([*SMALL, "true"]).returncode


@pytest.mark.thorough
@pytest.mark.parametrize("place", ["a name too long for a socket", "a /dev/shm that is full"])
def test_processes_hand_over_where_torch_could_not_share_a_tensor(place, tmp_path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    if not (full := "full" in place):
        before, folder = (), long
    elif may_mount():
        before, folder = SMALL, tmp_path
    else:
        pytest.skip("only root may mount a /dev/shm")
    program = READ if full else READ.replace("80000", "40")
    variables = {**environment(), "TMPDIR": str(folder)}
    command = [*before, sys.executable, "-c", program]
    subprocess.run(command, cwd=ROOT, env=variables, check=True, timeout=120)


@pytest.mark.skipif(not may_mount(), reason="only root may mount a /dev/shm")
def test_a_run_without_room_for_semaphores_is_refused():
    program = "from gengram_megatron.engine.processes import check_shared_memory as c; c()"
    command = [*SMALL, sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert "UserError: /dev/shm has" in done.stderr


def test_processes_that_cannot_be_started_are_told(monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("multiprocessing.synchronize._multiprocessing.SemLock", full)
    with pytest.raises(UserError, match=r"data.workers is 2.*data.workers to 0"):
        read(InSequence(), 1, workers=2)


def test_a_microbatch_is_a_small_tensor_of_bytes():
    (microbatch,) = next(
        BatchStream(
            Numbered(),
            InSequence(),
            consumed=4,
            total=None,
            global_batch_size=4,
            micro_batch_size=4,
            data_rank=0,
            data_size=1,
            workers=0,
        )
    )
    assert microbatch.dtype == torch.uint8 and microbatch.shape == (4, 3)
    assert samples_of(microbatch) == [4, 5, 6, 7]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_last_step_is_filled_up_with_rows_that_count_nothing(ranks):
    """19 samples in batches of 8: each counts once, and all ranks get as many microbatches."""
    seen, masked = [], 0
    for rank in range(ranks):
        stream = BatchStream(
            Numbered(),
            InSequence(),
            consumed=0,
            total=19,
            global_batch_size=8,
            micro_batch_size=2,
            data_rank=rank,
            data_size=ranks,
            workers=0,
        )
        rows = [microbatch for step in stream for microbatch in step]
        assert len(rows) == 3 * 8 // (2 * ranks)
        for row in torch.cat(rows):
            if (row == EOD).all():
                masked += 1
                assert split_batch(row[None])[2].sum() == 0
            else:
                seen += samples_of(row[None])
    assert sorted(seen) == list(range(19)) and masked == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_the_random_numbers_of_the_run_alone(workers):
    before = torch.get_rng_state()
    read(SampleOrder(1000, 7), 1, workers=workers)
    assert torch.equal(before, torch.get_rng_state())


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="global batch of 8"):
        read(InSequence(), 1, batch=8, micro=3)


def test_labels_are_the_next_token_and_only_eod_is_masked():
    tokens = torch.tensor([[8, 9, 5, EOD], [7, 6, 9, 8]], dtype=torch.uint8)
    inputs, labels, mask = split_batch(tokens)
    assert inputs.tolist() == [[8, 9, 5], [7, 6, 9]] and inputs.dtype == torch.int64
    assert labels.tolist() == [[9, 5, EOD], [6, 9, 8]] and labels.dtype == torch.int64
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1]] and mask.dtype == torch.float32


def test_an_error_in_a_reading_process_ends_the_training_process():
    """With its traceback, which must not keep the processes alive that this one waits for."""
    program = """
from tests.test_batches import Numbered, InSequence
from contextlib import closing
from gengram_megatron.engine.data.batches import BatchStream
class Failing(Numbered):
    def __getitem__(self, index):
        if index > 20:
            raise OSError(5, "the disk failed")
        return super().__getitem__(index)
sizes = dict(global_batch_size=8, micro_batch_size=1, data_rank=0, data_size=1)
stream = BatchStream(Failing(), InSequence(), consumed=0, total=None, workers=1, **sizes)
with closing(stream):
    for _ in stream:
        pass
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and "the disk failed" in done.stderr


def test_samples_of_a_process_that_has_just_died_are_no_missing_file(monkeypatch):
    """The file lay in that process. The loader says why it died, if that is known in time."""
    monkeypatch.setattr(batches, "SIGNAL_SECONDS", 0)
    with (
        pytest.raises(RankError, match=r"rank 3: .*data\.workers.*died"),
        reporting_dead_workers(3),
    ):
        batches._open_step("/proc/999999999/fd/7", (1, 1, 3))
