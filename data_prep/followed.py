"""The checksum of a file that is still being written."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_prep.interrupts import as_finished, interrupts_held_back

AT_A_TIME = 1 << 20
"""Bytes that are read and hashed at a time."""


class Followed:
    """A file whose parts are written in any order, by any process, and hashed meanwhile.

    SHA-256 goes through a file from its beginning, on one core, so at the end all others would
    wait for it: a thread hashes as far as the file is complete.
    """

    def __init__(self, path: Path, ends: list[int]):
        """`ends` are the bytes at which the parts end, one after the other."""
        self.path = path
        self._ends = ends
        self._missing = set(range(len(ends)))
        self._file = path.open("rb", buffering=0)
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._stop = False

    @property
    def hashed(self) -> int:
        """How many bytes have been gone through."""
        return self._file.tell()

    def __enter__(self) -> "Followed":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        with interrupts_held_back():
            self._thread.shutdown(cancel_futures=True)
        self._file.close()

    def written(self, part: int) -> None:
        """Say that a part, by its number, is in the file."""
        self._missing.discard(part)
        complete = min(self._missing, default=len(self._ends))
        if complete:
            with interrupts_held_back():
                self._thread.submit(self._hash_to, self._ends[complete - 1])

    def facts(
        self, advance: Callable[[int], None] = lambda count: None, told: int = 0
    ) -> dict[str, Any]:
        """Size and SHA-256 of the whole file, to be asked for when all parts are written; `advance`
        is told meanwhile how many more bytes were gone through, from byte `told` on."""
        size = self.path.stat().st_size

        def tell() -> None:
            nonlocal told
            hashed = self.hashed
            advance(hashed - told)
            told = hashed

        with interrupts_held_back():
            rest = self._thread.submit(self._hash_to, size)
        for future in as_finished([rest], tell):
            future.result()
        return {"bytes": size, "sha256": self._digest.hexdigest()}

    def _hash_to(self, end: int) -> None:
        while not self._stop and (block := self._file.read(min(end - self.hashed, AT_A_TIME))):
            self._digest.update(block)
