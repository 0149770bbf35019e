"""One file from its server to its place on the disk: resumed, retried, verified, and recorded.

What has come so far of a file lies beside its place, with a note of which version of the file it
belongs to. `downloads.json` records what a folder's files are and where they are from.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Event, Lock
from typing import Any
from urllib.parse import unquote, urlsplit

import requests
from urllib3.exceptions import HTTPError, ProtocolError

from data_prep.download.web import Web
from gengram_megatron.errors import UserError
from gengram_megatron.files import flush, replacing


@dataclass(frozen=True)
class Wanted:
    """The name a file is stored as, where it comes from, and its checksums where known."""

    name: str
    url: str
    checksums: dict[str, str]  # by hashlib's names, lower case


def web_address(url: str) -> str:
    """The https address of an object in a public S3 bucket; any other URL as it is."""
    if not url.startswith("s3://"):
        return url
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return f"https://{bucket}.s3.amazonaws.com/{key}"


def name_in(url: str) -> str:
    """The last part of a URL's path."""
    return unquote(PurePosixPath(urlsplit(url).path).name)


class Partial:
    """`<name>.partial`, and beside it `<name>.partial.json`, which tells if it can be gone on with.

    The version is the server's ETag or date. It goes back as If-Range, so a server whose file has
    changed sends all of the new one, not the rest of another. Without a version there is no
    telling, and the file starts anew.
    """

    def __init__(self, folder: Path, name: str, url: str):
        self.path = folder / f"{name}.partial"
        self._version_path = folder / f"{name}.partial.json"
        self._url = url

    @property
    def size(self) -> int:
        """Bytes that need not be asked for again."""
        return self.path.stat().st_size if self.path.exists() and self._version() else 0

    def request_headers(self) -> dict[str, str]:
        """What asks for the rest of the file, or for all of it if nothing is there."""
        if not self.size:
            return {}
        return {"Range": f"bytes={self.size}-", "If-Range": self._version()}

    def prepare(self, response: requests.Response) -> int | None:
        """Be ready to append the body of an answer, and give the bytes that the whole file has.

        A body that is not the rest of what is here replaces it: the file has changed, or the
        server ignores ranges.
        """
        if response.status_code == 206:
            return self._total(response)
        self.discard()
        version = {"url": self._url, "version": _version_of(response)}
        self._version_path.write_text(json.dumps(version) + "\n")
        self.path.touch()
        length = response.headers.get("Content-Length")
        return int(length) if length else None

    def _total(self, response: requests.Response) -> int | None:
        """The whole size that comes with a part; ProtocolError if it is not the part asked for."""
        match = re.match(r"bytes (\d+)-\d+/(\d+|\*)$", response.headers.get("Content-Range", ""))
        # Some servers heed Range and not If-Range, but still say which version they send.
        same = _version_of(response) in (None, self._version())
        if not match or int(match[1]) != self.size or not same:
            self.discard()
            raise ProtocolError("the server sent another part of the file than it was asked for")
        return None if match[2] == "*" else int(match[2])

    def is_whole(self, response: requests.Response) -> bool:
        """Whether the answer 416, no such range, means that there is no more to come."""
        return response.headers.get("Content-Range") == f"bytes */{self.size}"

    def become(self, path: Path) -> None:
        """Take the file's own name."""
        self.path.replace(path)
        self._version_path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Forget it all."""
        self.path.unlink(missing_ok=True)
        self._version_path.unlink(missing_ok=True)

    def _version(self) -> str | None:
        try:
            known = json.loads(self._version_path.read_text())
            return known["version"] if known["url"] == self._url else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None


def _version_of(response: requests.Response) -> str | None:
    etag = response.headers.get("ETag")
    if etag and not etag.startswith("W/"):  # a weak one does not promise the same bytes
        return etag
    return response.headers.get("Last-Modified")


RECORD = "downloads.json"


class Record:
    """URL, size and checksums of the files of a folder by name, kept on the disk at each change."""

    def __init__(self, folder: Path):
        self._path = folder / RECORD
        self._lock = Lock()
        self._files: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            try:
                self._files = json.loads(self._path.read_text())["files"]
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{self._path} is damaged; move it away, and the files that have no checksum"
                ) from None

    def get(self, name: str) -> dict[str, Any] | None:
        """What is known of a file."""
        return self._files.get(name)

    def add(self, name: str, url: str, size: int, checksums: dict[str, str]) -> None:
        """Add a file or replace what was known of it."""
        with self._lock:
            self._files[name] = {"url": url, "bytes": size, **checksums}
            files = {"files": dict(sorted(self._files.items()))}
            with replacing(self._path) as beside:
                beside.write_text(json.dumps(files, indent=2) + "\n")


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
