"""Data sets as training opens them: what they hold, and what is said of those it cannot use."""

import json
import os
import pickle
import shutil
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from gengram_megatron.data_set import CHECKED, check, identity, not_checked_yet
from gengram_megatron.engine.data.batches import BatchStream
from gengram_megatron.engine.data.samples import FragmentDataset, SampleOrder
from gengram_megatron.engine.training import nodes
from gengram_megatron.errors import UserError
from gengram_megatron.signals import StopSignals
from gengram_megatron.tokenizer import EOD
from tests.built_sets import random_fragments, write_set

LENGTH, COUNT = 16, 40


@pytest.fixture
def fragments() -> np.ndarray:
    return random_fragments(COUNT, LENGTH, seed=1)


@pytest.fixture
def folder(tmp_path, fragments) -> Path:
    """A data set as data_prep writes it."""
    return write_set(tmp_path / "dataset", fragments[:30], fragments[30:])


def change_manifest(folder: Path, **values) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_split_holds_its_fragments_and_each_ends_with_eod(folder, fragments):
    train = FragmentDataset(folder, "train", LENGTH)
    validation = FragmentDataset(folder, "validation", LENGTH)
    assert (len(train), len(validation)) == (30, 10)
    for dataset, expected in ((train, fragments[:30]), (validation, fragments[30:])):
        tokens = np.stack([dataset[index] for index in range(len(dataset))])
        assert tokens.dtype == np.uint8
        assert np.array_equal(tokens[:, :-1], expected) and (tokens[:, -1] == EOD).all()


def test_it_travels_to_other_processes(folder, fragments):
    copy = pickle.loads(pickle.dumps(FragmentDataset(folder, "validation", LENGTH)))
    assert np.array_equal(copy[9][:-1], fragments[39])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_of_microbatches_holds_every_fragment_once(folder, fragments, workers):
    dataset = FragmentDataset(folder, "train", LENGTH)
    stream = BatchStream(
        dataset,
        SampleOrder(len(dataset), seed=5),
        consumed=0,
        total=None,
        global_batch_size=6,
        micro_batch_size=3,
        data_rank=0,
        data_size=1,
        workers=workers,
    )
    with closing(stream):
        steps = [step.flatten(0, 1).numpy() for step in islice(stream, 5)]
    rows = np.concatenate(steps)
    assert sorted(map(bytes, rows[:, :-1])) == sorted(map(bytes, fragments[:30]))


def refused(folder, length=LENGTH, split="train") -> str:
    with pytest.raises(UserError) as error:
        FragmentDataset(folder, split, length)
    return str(error.value)


def test_a_missing_folder_says_what_makes_one(tmp_path):
    assert "gengram-data build" in refused(tmp_path / "nowhere")


def test_a_folder_without_a_manifest_is_no_data_set(tmp_path):
    assert "manifest.json" in refused(tmp_path)


def test_another_format_is_refused(folder):
    change_manifest(folder, format=99)
    assert "format 99" in refused(folder)


def test_another_length_names_both(folder):
    message = refused(folder, length=32)
    assert "have 16 bases" in message and "model.seq_length is 32" in message


def test_other_token_ids_are_refused(folder):
    change_manifest(folder, tokens={"A": 0, "EOD": 4})
    assert "token ids {'A': 0, 'EOD': 4}" in refused(folder)


@pytest.mark.parametrize("name", ["train.bin", "train.idx"])
def test_a_truncated_file_is_named(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1])
    message = refused(folder)
    assert name in message and "cut off" in message
    FragmentDataset(folder, "validation", LENGTH)


def test_an_empty_split_is_named(tmp_path, fragments):
    folder = write_set(tmp_path / "all_train", fragments, fragments[:0])
    assert "has no validation samples" in refused(folder, split="validation")
    assert len(FragmentDataset(folder, "train", LENGTH)) == COUNT


def test_a_missing_file_and_an_unknown_split_are_named(folder):
    (folder / "train.bin").unlink()
    assert "train.bin is missing" in refused(folder)
    assert "lists no test.bin" in refused(folder, split="test")


@pytest.fixture
def train(folder, tmp_path, monkeypatch) -> FragmentDataset:
    """The training split, and a cache folder of the user's that is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return FragmentDataset(folder, "train", LENGTH)


def checked(dataset: FragmentDataset) -> list[str]:
    """Checks the files of a split; names of those that had to be read."""
    files = not_checked_yet(dataset.files)
    for file in files:
        assert sum(check(file)) == file.path.stat().st_size
    return [file.path.name for file in files]


@pytest.mark.parametrize("writable", [True, False])
def test_a_file_is_read_once_until_it_changes(train, tmp_path, writable):
    if not writable:  # nobody, not even root, can write a file there
        (train.folder / CHECKED).mkdir()
    assert checked(train) == ["train.bin", "train.idx"] and checked(train) == []
    assert (tmp_path / "cache").exists() is not writable
    (train.folder / "train.idx").touch()
    assert checked(train) == ["train.idx"] and checked(train) == []


def test_a_file_is_read_each_time_where_nothing_can_be_remembered(train, tmp_path):
    (train.folder / CHECKED).mkdir()
    (tmp_path / "cache").write_text("no folder")
    assert checked(train) == checked(train) == ["train.bin", "train.idx"]


@pytest.mark.parametrize("name", ["train.bin", "train.idx"])
@pytest.mark.parametrize("keeps_time", [False, True])
def test_a_changed_byte_is_found_in_a_set_that_was_whole(train, name, keeps_time):
    checked(train)
    path = train.folder / name
    before, content = path.stat(), bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    if keeps_time:  # as a copy of the folder would
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    for _ in range(2):  # what was found damaged is not remembered as whole
        with pytest.raises(UserError) as error:
            checked(FragmentDataset(train.folder, "train", LENGTH))
        assert str(path) in str(error.value)
        assert f"gengram-data verify {train.folder}" in str(error.value)


def test_notes_that_are_damaged_are_made_again(train):
    for content in ("", "[]", "{", '{"train.bin": 3}'):
        (train.folder / CHECKED).write_text(content)
        assert checked(train) == ["train.bin", "train.idx"]
        assert checked(train) == []


def test_checking_that_takes_long_says_how_far_it_is(train, one_process, monkeypatch, capsys):
    monkeypatch.setattr(nodes, "READ_SECONDS", -1)  # exchange progress after every block
    nodes.check_content(train.files, StopSignals())
    size = train.files[0].path.stat().st_size
    share = size / (size + train.files[1].path.stat().st_size)
    assert f"checking data: {share:.0%} of " in capsys.readouterr().out
    nodes.check_content(train.files, StopSignals())
    assert capsys.readouterr().out == ""


def test_a_file_that_nodes_share_is_read_by_one_of_them(train, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(train.folder, copy)  # with the times of the files, as on a node's own disk
    there = FragmentDataset(copy, "train", LENGTH)
    own, other = ([identity(file) for file in one.files] for one in (train, there))
    reads = nodes.readers([own, [], own, other, [None]])
    assert [reads[key] for key in own] == [0, 2] and [reads[key] for key in other] == [3, 3]
    (copy / "train.bin").unlink()
    assert identity(there.files[0]) is None
    (lost, *_) = not_checked_yet(there.files)
    with pytest.raises(UserError, match=r"train.bin cannot be read"):
        sum(check(lost))


def test_a_request_to_stop_leaves_the_rest_unchecked(train, one_process):
    signals = StopSignals()
    signals.received = True
    nodes.check_content(train.files, signals)
    assert [file.path.name for file in not_checked_yet(train.files)] == ["train.bin", "train.idx"]
