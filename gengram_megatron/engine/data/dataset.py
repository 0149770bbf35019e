"""The fragments of a built data set, memory-mapped and read by number."""

from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from gengram_megatron.data_set import (
    MANIFEST,
    DataFile,
    no_data_set,
    other_seq_length,
    read_manifest,
)
from gengram_megatron.errors import UserError
from gengram_megatron.tokenizer import BASE_IDS, BASES, EOD


class FragmentDataset:
    """One split of a data set that `gengram-data build` wrote. A fragment is a training sample.

    Args:
        folder: the data set's folder.
        split: "train" or "validation".
        seq_length: number of bases per sample that the model expects.
        key: the config key that names the folder, for error messages.

    Attributes:
        sha256: checksum of the fragments, from the data set's manifest.
        files: the files that hold the split, with their checksums from the manifest.
    """

    def __init__(self, folder: Path, split: str, seq_length: int, key: str = "data.path"):
        self._arguments = (folder, split, seq_length, key)
        self.folder, self.key = Path(folder), key
        manifest = _check(self.folder, split, seq_length, key)
        self.files = [
            DataFile(self.folder / name, manifest["files"][name]["sha256"])
            for name in (f"{split}.bin", f"{split}.idx")
        ]
        self.sha256: str = self.files[0].sha256
        self._fragments = _open(Path(folder) / split)

    def __len__(self) -> int:
        return len(self._fragments)

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns tokens [seq_length + 1], uint8: the bases and EOD. A read-only view of the file."""
        return self._fragments[index]

    def __reduce__(self) -> tuple:
        # A process that a loader spawns, rather than forks, opens the files again.
        return FragmentDataset, self._arguments


def _check(folder: Path, split: str, seq_length: int, key: str) -> dict[str, Any]:
    """Returns the manifest. Raises UserError unless the folder holds the complete split, with the
    sequence length that the model expects."""
    if not folder.is_dir():
        raise UserError(no_data_set(key, folder))
    manifest = read_manifest(folder)
    built_length = manifest["settings"]["seq_length"]
    if built_length != seq_length:
        raise UserError(other_seq_length(key, folder, built_length, seq_length))
    expected = {**dict(zip(BASES, BASE_IDS)), "EOD": EOD}
    if manifest["tokens"] != expected:
        raise UserError(
            f"{folder / MANIFEST} was made with the token ids {manifest['tokens']}, but this "
            f"version uses {expected}; build the data set again"
        )
    for name in (f"{split}.bin", f"{split}.idx"):
        _check_size(folder / name, manifest["files"].get(name))
    if not manifest["files"][f"{split}.bin"]["bytes"]:
        raise UserError(
            f"{key}: {folder} has no {split} samples; build the data set again, with a different "
            "share held out for validation"
        )
    return manifest


def _check_size(path: Path, facts: dict[str, Any] | None) -> None:
    """Raise UserError unless a file has the size given in the manifest. (Checksums take reading all
    of it, so they are compared only once per data set, when a run starts: data_set.py.)"""
    if facts is None:
        raise UserError(f"{path.parent / MANIFEST} lists no {path.name}; build the data set again")
    if not path.is_file():
        raise UserError(f"{path} is missing; build the data set again")
    size = path.stat().st_size
    if size != facts["bytes"]:
        raise UserError(
            f"{path} has {size:,} bytes and should have {facts['bytes']:,}: it was cut off or "
            f"changed; copy or build the data set again"
        )


def _open(prefix: Path) -> Any:
    """Open the split as megatron-core's IndexedDataset."""
    return IndexedDataset(str(prefix))
