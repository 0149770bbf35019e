"""All files of a download list, several at a time."""

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
from data_prep.download.plan import Item, check_space, standing, wanted_files
from data_prep.download.schema import DownloadConfig
from data_prep.download.web import Web
from data_prep.workers import as_finished, interrupts_held_back
from gengram_megatron.errors import UserError


class Watcher(Protocol):
    """Someone who is told how a download goes on; `received` from several threads at once."""

    def received(self, name: str, here: int, size: int | None) -> None:
        """So many bytes of a file are there; of how many, if that is known."""

    def stored(self, name: str, size: int) -> None:
        """A file is whole and in its place."""


def plan(config: DownloadConfig, config_folder: Path, web: Web) -> list[Item]:
    """How all files of the list stand. Writes nothing."""
    folder = Path(config.output)
    files = wanted_files(config, config_folder, web)
    items = standing(files, folder, Record(folder), web, config.parallel)
    check_space(items, folder)
    return items


def download(config: DownloadConfig, items: list[Item], web: Web, watcher: Watcher) -> list[int]:
    """Fetch the files that are not there; the sizes of those.

    A file that fails does not keep the others from coming; what failed is one UserError at the
    end. When the program is interrupted, partial files stay to be gone on with.
    """
    folder, stop = Path(config.output), Event()
    sizes, problems = [], []
    with _own(folder), ThreadPoolExecutor(config.parallel) as pool:
        record = Record(folder)
        _record_adopted(items, folder, record)
        store = partial(_store, folder=folder, record=record, web=web, stop=stop, watcher=watcher)
        try:
            with interrupts_held_back():
                futures = {pool.submit(store, item): item for item in items if not item.here}
            for future in as_finished(futures):
                try:
                    sizes.append(future.result())
                    watcher.stored(futures[future].wanted.name, sizes[-1])
                except UserError as error:
                    problems.append(str(error))
        finally:  # also after Ctrl-C, when threads would otherwise go on to the end
            with interrupts_held_back():
                stop.set()
                pool.shutdown(cancel_futures=True)
    if problems:
        raise UserError("\n".join(problems))
    return sizes


def _record_adopted(items: list[Item], folder: Path, record: Record) -> None:
    for item in items:
        if item.adopted:
            size = (folder / item.wanted.name).stat().st_size
            record.add(item.wanted.name, item.wanted.url, size, item.adopted)


def _store(
    item: Item, folder: Path, record: Record, web: Web, stop: Event, watcher: Watcher
) -> int:
    """Fetch one file and put it in its place; its size."""
    wanted = item.wanted
    path, part = folder / wanted.name, Partial(folder, wanted.name, wanted.url)
    try:
        found = fetch(wanted, folder, web, stop, partial(watcher.received, wanted.name))
        size = part.path.stat().st_size
        # The record comes first: a file that is there is in it, whenever the process is killed.
        record.add(wanted.name, wanted.url, size, found)
        part.become(path)
    except OSError as error:
        raise UserError(
            f"{path} could not be written: {error.strerror or error}; "
            "run the same command again to go on"
        ) from error
    return size


@contextmanager
def _own(folder: Path) -> Iterator[None]:
    """Make the folder and keep a second download out of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}; give another --out") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"another download is filling {folder}; wait until it has ended") from None
    except OSError:  # a network file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)
