"""Fetches all files of a download list, several at a time."""

import fcntl
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import Protocol

from data_prep.download.fetch import Partial, Record, fetch
from data_prep.download.plan import Item, check_space, check_state, remote_files
from data_prep.download.schema import DownloadConfig
from data_prep.download.web import Web
from data_prep.workers import as_finished, interrupts_held_back
from gengram_megatron.errors import UserError


class Watcher(Protocol):
    """Receives the progress of a download; `received` is called from several threads at once."""

    def received(self, name: str, received: int, size: int | None) -> None:
        """Reports that `received` bytes of a file are on the disk.

        `size` is that of the whole file, if known.
        """

    def stored(self, name: str, size: int) -> None:
        """Reports that a file is complete and has its final name."""


def plan(config: DownloadConfig, config_folder: Path, web: Web) -> list[Item]:
    """Returns the state of all files of the list; writes nothing.

    Raises UserError if a file cannot be fetched, or the disk is too small.
    """
    folder = Path(config.output)
    files = remote_files(config, config_folder, web)
    items = check_state(files, folder, Record(folder), web, config.parallel)
    check_space(items, folder)
    return items


def download(config: DownloadConfig, items: list[Item], web: Web, watcher: Watcher) -> list[int]:
    """Fetches the files that are not complete; returns the sizes of those, in bytes.

    If a file fails, the others are still fetched; all failures are raised as one UserError at the
    end. When the program is interrupted, partial files are kept and can be resumed.
    """
    folder, stop = Path(config.output), Event()
    sizes, problems = [], []
    with _locked(folder), ThreadPoolExecutor(config.parallel) as pool:
        record = Record(folder)
        _record_adopted(items, folder, record)
        store = partial(_store, folder=folder, record=record, web=web, stop=stop, watcher=watcher)
        try:
            with interrupts_held_back():
                futures = {pool.submit(store, item): item for item in items if not item.complete}
            for future in as_finished(futures):
                try:
                    sizes.append(future.result())
                    watcher.stored(futures[future].file.name, sizes[-1])
                except UserError as error:
                    problems.append(str(error))
        finally:  # also after Ctrl-C; otherwise the threads would fetch all files to the end
            with interrupts_held_back():
                stop.set()
                pool.shutdown(cancel_futures=True)
    if problems:
        raise UserError("\n".join(problems))
    return sizes


def _record_adopted(items: list[Item], folder: Path, record: Record) -> None:
    for item in items:
        if item.adopted:
            size = (folder / item.file.name).stat().st_size
            record.add(item.file.name, item.file.url, size, item.adopted)


def _store(
    item: Item, folder: Path, record: Record, web: Web, stop: Event, watcher: Watcher
) -> int:
    """Fetches one file and gives it its final name; returns its size in bytes."""
    file = item.file
    path, part = folder / file.name, Partial(folder, file.name, file.url)
    try:
        checksums = fetch(file, folder, web, stop, partial(watcher.received, file.name))
        size = part.path.stat().st_size
        # Recorded first, so that a file with its final name is in the record even if the process
        # is killed here.
        record.add(file.name, file.url, size, checksums)
        part.rename(path)
    except OSError as error:
        raise UserError(
            f"{path} could not be written: {error.strerror or error}; "
            "run the same command again to resume"
        ) from error
    return size


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Creates the folder and locks it; raises UserError if another download has locked it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be created: {error.strerror}; give another --out"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"another download is writing to {folder}; wait until it has ended"
        ) from None
    except OSError:  # a network file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)
