"""One split as the files of a megatron-core IndexedDataset."""

from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np

from data_prep.origins import ORIGIN, origins_path
from gengram_megatron.tokenizer import EOD


class SplitWriter:
    """Writes `<split>.bin` and `.idx`, a document of uint8 for each fragment: its bases and EOD;
    and `<split>.origins.npy`, where each fragment comes from."""

    def __init__(self, folder: Path, split: str):
        # Here, because they take seconds, which nobody should wait to read of a wrong config.
        from gengram_megatron.platform import prepare

        prepare()
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self._prefix = folder / split
        self._origins_path = origins_path(folder, split)
        self._origins: list[np.ndarray] = []
        self._builder = IndexedDatasetBuilder(f"{self._prefix}.bin", dtype=np.uint8)

    def __enter__(self) -> "SplitWriter":
        return self

    def add(
        self, fragments: np.ndarray, record: int, starts: np.ndarray, reverse: np.ndarray
    ) -> None:
        """Append fragments [count, seq_length] of one record, a row number of records.tsv, and
        say where they start in it and which are its reverse complement (both [count])."""
        tokens = np.pad(fragments, ((0, 0), (0, 1)), constant_values=EOD)
        for document in tokens:
            self._builder.add_document(document, [len(document)])
        origins = np.empty(len(starts), dtype=ORIGIN)
        origins["record"], origins["start"] = record, starts
        origins["strand"] = np.where(reverse, b"-", b"+")
        self._origins.append(origins)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            # The disk may be full: what is still in the buffer fails again, and is not wanted.
            with suppress(OSError):
                self._builder.data_file.close()
            return
        self._builder.finalize(f"{self._prefix}.idx")
        np.save(self._origins_path, np.concatenate(self._origins))
