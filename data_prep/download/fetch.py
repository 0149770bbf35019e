"""Fetches one file from its server: resumes, retries, verifies and records it.

The bytes received so far lie beside the file's final path, with a note of the version of the file
that they belong to. `downloads.json` records what the files of a folder are and where they come
from.
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
class RemoteFile:
    """A file to fetch."""

    name: str  # the name to store it as
    url: str
    checksums: dict[str, str]  # those that are known, by hashlib's names, in lower case


def web_address(url: str) -> str:
    """Returns the https URL of an object in a public S3 bucket; any other URL unchanged."""
    if not url.startswith("s3://"):
        return url
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return f"https://{bucket}.s3.amazonaws.com/{key}"


def name_in(url: str) -> str:
    """Returns the last part of a URL's path."""
    return unquote(PurePosixPath(urlsplit(url).path).name)


class Partial:
    """The file `<name>.partial`, and `<name>.partial.json`, which decides if it can be resumed.

    The latter holds the file's version: the server's ETag or date. It is sent back as If-Range, so
    that a server whose file has changed sends the whole new file, not the rest of another one.
    Without a version, the download starts again from the beginning.
    """

    def __init__(self, folder: Path, name: str, url: str):
        self.path = folder / f"{name}.partial"
        self._version_path = folder / f"{name}.partial.json"
        self._url = url

    @property
    def size(self) -> int:
        """The number of bytes that need not be requested again."""
        return self.path.stat().st_size if self.path.exists() and self._version() else 0

    def request_headers(self) -> dict[str, str]:
        """Returns headers that request the rest of the file, or all of it if nothing is here."""
        version = self._version()
        if version is None or not self.size:
            return {}
        return {"Range": f"bytes={self.size}-", "If-Range": version}

    def prepare(self, response: requests.Response) -> int | None:
        """Prepares the partial file so that the body of a response can be appended to it.

        If the body is not the missing rest, what was received before is discarded: the file has
        changed, or the server ignores ranges.

        Returns the size of the whole file in bytes; None if it is not known.
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
        """Returns the size of the whole file from the response to a range request; None if unknown.

        Raises ProtocolError if the response is not the requested part.
        """
        match = re.match(r"bytes (\d+)-\d+/(\d+|\*)$", response.headers.get("Content-Range", ""))
        # Some servers support Range but not If-Range, and still tell which version they send.
        same = _version_of(response) in (None, self._version())
        if not match or int(match[1]) != self.size or not same:
            self.discard()
            raise ProtocolError("the server sent another part of the file than requested")
        return None if match[2] == "*" else int(match[2])

    def is_whole(self, response: requests.Response) -> bool:
        """Returns whether a response with status 416 (no such range) means that the file is
        complete."""
        return response.headers.get("Content-Range") == f"bytes */{self.size}"

    def rename(self, path: Path) -> None:
        """Moves the file to its final path."""
        self.path.replace(path)
        self._version_path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Deletes all that was received."""
        self.path.unlink(missing_ok=True)
        self._version_path.unlink(missing_ok=True)

    def _version(self) -> str | None:
        try:
            stored = json.loads(self._version_path.read_text())
            return stored["version"] if stored["url"] == self._url else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None


def _version_of(response: requests.Response) -> str | None:
    etag = response.headers.get("ETag")
    if etag and not etag.startswith("W/"):  # a weak ETag does not promise identical bytes
        return etag
    return response.headers.get("Last-Modified")


RECORD = "downloads.json"


class Record:
    """URL, size and checksums of a folder's files by name; each change is stored at once."""

    def __init__(self, folder: Path):
        self._path = folder / RECORD
        self._lock = Lock()
        self._files: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            try:
                self._files = json.loads(self._path.read_text())["files"]
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{self._path} is damaged; move it away, together with the files that have no "
                    "checksum in the download list"
                ) from None

    def get(self, name: str) -> dict[str, Any] | None:
        """Returns what is recorded of a file; None if nothing."""
        return self._files.get(name)

    def add(self, name: str, url: str, size: int, checksums: dict[str, str]) -> None:
        """Records a file, replacing what was recorded of it before."""
        with self._lock:
            self._files[name] = {"url": url, "bytes": size, **checksums}
            files = {"files": dict(sorted(self._files.items()))}
            with replacing(self._path) as beside:
                beside.write_text(json.dumps(files, indent=2) + "\n")


BLOCK = 1 << 20
RECEIVE_BLOCK = 1 << 16
"""Bytes received and written at a time; an incomplete block is lost when a connection breaks."""

Report = Callable[[int, int | None], None]
"""A callback that is told how many bytes of a file are received, and the file's size if known."""


class Stopped(Exception):
    """Ends a download because another thread has asked all of them to stop."""


def fetch(file: RemoteFile, folder: Path, web: Web, stop: Event, report: Report) -> dict[str, str]:
    """Fetches what is missing of a file into its partial file and verifies it.

    Returns its checksums by hashlib's names. Raises UserError if a known checksum differs after the
    whole file was received in one go, or the connection breaks off too often.
    """
    partial = Partial(folder, file.name, file.url)
    while True:
        resumed = _receive(file, partial, web, stop, report)
        computed = checksums(partial.path, {"sha256", *file.checksums}, stop)
        wrong = [kind for kind in file.checksums if computed[kind] != file.checksums[kind]]
        if not wrong:
            flush(partial.path)
            return computed
        partial.discard()
        if not resumed:
            kind = wrong[0]
            raise UserError(
                f"{file.url} has {kind} {computed[kind]} and not {file.checksums[kind]}; "
                "the file has changed or the checksum is that of another file"
            )


def checksums(path: Path, kinds: set[str], stop: Event) -> dict[str, str]:
    """Returns checksums of a file by hashlib's names, in one reading."""
    digests = {kind: hashlib.new(kind) for kind in sorted(kinds)}
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            _check_stop(stop)
            for digest in digests.values():
                digest.update(block)
    return {kind: digest.hexdigest() for kind, digest in digests.items()}


def _receive(file: RemoteFile, partial: Partial, web: Web, stop: Event, report: Report) -> bool:
    """Receives the whole file into the partial file; returns whether the last request resumed it.

    Failures are counted from the last one that got farther than all before it. So a large file is
    received even over a bad connection, but a server that always breaks off at the same byte is
    given up.
    """
    farthest, failures = partial.size, 0
    while True:
        try:
            return _receive_rest(file, partial, web, stop, report)
        except HTTPError as error:
            if partial.size > farthest:
                farthest, failures = partial.size, 0
            if failures == web.retries:
                raise UserError(
                    f"{file.url} broke off after {partial.size:,} bytes, {failures + 1} times in "
                    f"a row: {error}; run the same command again to resume"
                ) from error
            failures += 1
            stop.wait(web.pause(failures))


def _receive_rest(
    file: RemoteFile, partial: Partial, web: Web, stop: Event, report: Report
) -> bool:
    """Sends one request for what is missing; returns whether some bytes were there before.

    Raises HTTPError if the body breaks off.
    """
    with web.get(file.url, partial.request_headers()) as response:
        if response.status_code == 416:
            if partial.is_whole(response):
                return True
            partial.discard()
            raise ProtocolError("the server has no such range")
        total = partial.prepare(response)
        received = start = partial.path.stat().st_size
        with partial.path.open("ab") as partial_file:
            for block in response.raw.stream(RECEIVE_BLOCK, decode_content=False):
                partial_file.write(block)
                received += len(block)
                report(received, total)
                _check_stop(stop)
    if total is not None and received != total:
        raise ProtocolError(f"only {received:,} of {total:,} bytes were received")
    return start > 0


def _check_stop(stop: Event) -> None:
    if stop.is_set():
        raise Stopped
