"""Data sets as training opens them: what they hold, and what is said of those it cannot use."""

import json
import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from data_prep.manifest import write_manifest
from data_prep.schema import DataConfig
from data_prep.write import SplitWriter, prepare_split
from gengram_megatron.data.batches import microbatches
from gengram_megatron.data.dataset import FragmentDataset
from gengram_megatron.data.order import SampleOrder
from gengram_megatron.errors import UserError
from gengram_megatron.tokenizer import BASE_IDS, EOD

LENGTH, COUNT = 16, 40


@pytest.fixture
def fragments() -> np.ndarray:
    return np.random.default_rng(1).choice(np.uint8(BASE_IDS), (COUNT, LENGTH))


@pytest.fixture
def folder(tmp_path, fragments) -> Path:
    """A data set as data_prep writes it."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    for split, part in (("train", fragments[:30]), ("validation", fragments[30:])):
        prepare_split(folder, split, len(part), LENGTH + 1)
        with SplitWriter(folder, split) as writer:
            starts = np.arange(len(part)) * LENGTH
            writer.add(part, 0, starts, np.zeros(len(part), dtype=bool))
    settings = {
        "output": str(folder),
        "seq_length": LENGTH,
        "groups": {"human": {"sources": {"one": {"fasta": "one.fa"}}}},
    }
    write_manifest(folder, DataConfig.model_validate(settings), {}, {}, {})
    return folder


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
    loader = microbatches(
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
    rows = np.concatenate([microbatch.numpy() for microbatch in islice(loader, 10)])
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


def test_a_missing_file_and_an_unknown_split_are_named(folder):
    (folder / "train.bin").unlink()
    assert "train.bin is missing" in refused(folder)
    assert "lists no test.bin" in refused(folder, split="test")
