"""Small data sets as `gengram-data build` leaves them, without the genomes."""

from pathlib import Path

import numpy as np

from data_prep.manifest import write_manifest
from data_prep.schema import DataConfig
from data_prep.write import SplitWriter, prepare_split
from gengram_megatron.tokenizer import BASE_IDS


def random_fragments(count: int, length: int, seed: int) -> np.ndarray:
    """Token ids [count, length], uint8."""
    return np.random.default_rng(seed).choice(np.uint8(BASE_IDS), (count, length))


def write_set(folder: Path, train: np.ndarray, validation: np.ndarray) -> Path:
    """A data set of these fragments, both [count, length]; returns its folder."""
    folder.mkdir()
    length = train.shape[1]
    for split, part in (("train", train), ("validation", validation)):
        prepare_split(folder, split, len(part), length + 1)
        with SplitWriter(folder, split) as writer:
            starts = np.arange(len(part)) * length
            writer.add(part, 0, starts, np.zeros(len(part), dtype=bool))
    settings = {
        "output": str(folder),
        "seq_length": length,
        "groups": {"human": {"sources": {"one": {"fasta": "one.fa"}}}},
    }
    write_manifest(folder, DataConfig.model_validate(settings), {}, {}, {}, {})
    return folder
