"""One file from its server to its place on the disk: resumed, retried, verified."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from threading import Event

from urllib3.exceptions import HTTPError, ProtocolError

from data_prep.download.partial import Partial
from data_prep.download.wanted import Wanted
from data_prep.download.web import Web
from gengram_megatron.errors import UserError
from gengram_megatron.files import flush

BLOCK = 1 << 20
RECEIVED = 1 << 16
"""Bytes written at a time; what of them has come when a connection breaks is lost."""

Report = Callable[[int, int | None], None]
"""Told how many bytes of a file are there, and how many it has if that is known."""


class Stopped(Exception):
    """Another thread wants the downloads to end."""


def fetch(wanted: Wanted, folder: Path, web: Web, stop: Event, report: Report) -> dict[str, str]:
    """Fetch all that is missing of a file's partial, verify it, and give its checksums."""
    partial = Partial(folder, wanted.name, wanted.url)
    while True:
        resumed = _receive(wanted, partial, web, stop, report)
        found = checksums(partial.path, {"sha256", *wanted.checksums}, stop)
        wrong = [kind for kind in wanted.checksums if found[kind] != wanted.checksums[kind]]
        if not wrong:
            flush(partial.path)
            return found
        partial.discard()
        if not resumed:
            kind = wrong[0]
            raise UserError(
                f"{wanted.url} has {kind} {found[kind]} and not {wanted.checksums[kind]}; "
                "the file has changed or the checksum is of another one"
            )


def checksums(path: Path, kinds: set[str], stop: Event) -> dict[str, str]:
    """Checksums of a file by the names of hashlib, in one reading."""
    digests = {kind: hashlib.new(kind) for kind in sorted(kinds)}
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            _check(stop)
            for digest in digests.values():
                digest.update(block)
    return {kind: digest.hexdigest() for kind, digest in digests.items()}


def _receive(wanted: Wanted, partial: Partial, web: Web, stop: Event, report: Report) -> bool:
    """Have the partial hold the whole file; whether some of it was there before.

    Tries are counted from the last one that got farther than all before it, so a long file over a
    bad line arrives, and a server that breaks off at the same place each time is given up.
    """
    farthest, failures = partial.size, 0
    while True:
        try:
            return _receive_rest(wanted, partial, web, stop, report)
        except HTTPError as error:
            if partial.size > farthest:
                farthest, failures = partial.size, 0
            if failures == web.retries:
                raise UserError(
                    f"{wanted.url} broke off after {partial.size:,} bytes, {failures + 1} times in "
                    f"a row: {error}; run the same command again to go on"
                ) from error
            failures += 1
            stop.wait(web.pause(failures))


def _receive_rest(wanted: Wanted, partial: Partial, web: Web, stop: Event, report: Report) -> bool:
    """One request for what is missing; HTTPError if the body breaks off."""
    with web.get(wanted.url, partial.request_headers()) as response:
        if response.status_code == 416:
            if partial.is_whole(response):
                return True
            partial.discard()
            raise ProtocolError("the server has no such range")
        total = partial.prepare(response)
        here = before = partial.path.stat().st_size
        with partial.path.open("ab") as file:
            for block in response.raw.stream(RECEIVED, decode_content=False):
                file.write(block)
                here += len(block)
                report(here, total)
                _check(stop)
    if total is not None and here != total:
        raise ProtocolError(f"{here:,} of {total:,} bytes came")
    return before > 0


def _check(stop: Event) -> None:
    if stop.is_set():
        raise Stopped
