"""HTTP for downloads: retries with backoff, and failures as sentences."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import requests
from requests.adapters import HTTPAdapter
from urllib3 import Retry

from gengram_megatron.errors import UserError

TEMPORARY = (429, 500, 502, 503, 504)
"""Statuses that may be gone a moment later, so that the request is tried again."""

BUSY = (429, 502, 503, 504)
"""Statuses that do not depend on the kind of the request."""

LONGEST_PAUSE = 120.0  # seconds


class Web:
    """Requests that are tried again when a server is busy or cannot be reached."""

    def __init__(self, retries: int, backoff: float, timeout: float):
        self.retries, self.backoff = retries, backoff
        self._retry = Retry(
            total=retries,
            backoff_factor=backoff,
            backoff_max=LONGEST_PAUSE,
            status_forcelist=TEMPORARY,
            raise_on_status=False,  # the status of the last response goes into the error message
        )
        self._timeout = timeout
        self._local = (
            threading.local()
        )  # requests does not promise that threads can share a session

    def text(self, url: str) -> str:
        """Returns the whole content of a small text file."""
        failures = 0
        while True:
            with self.get(url) as response:
                try:
                    return response.text
                except requests.RequestException:  # the connection broke off
                    if failures == self.retries:
                        raise
            failures += 1
            time.sleep(self.pause(failures))

    def pause(self, failures: int) -> float:
        """Returns the seconds to wait after a number of failures in a row."""
        return min(self.backoff * 2.0 ** (failures - 1), LONGEST_PAUSE)

    def size(self, url: str) -> int | None:
        """Returns the size of a file in bytes; None if the server does not tell before sending it.

        Some servers refuse HEAD but answer GET: a signed URL of S3 answers 403, because its
        signature is for GET. So if HEAD is refused, this requests the first byte, and if that is
        refused too, the whole file, without reading its body. Only the error of this last request
        is reported.
        """
        try:
            with self._request("HEAD", url, {}) as response:
                if response.status_code < 400:
                    return _content_length(response)
                if response.status_code in BUSY:
                    _check(url, response)
            with self._request("GET", url, {"Range": "bytes=0-0"}) as response:
                if response.status_code in (206, 416):
                    total = response.headers.get("Content-Range", "").rpartition("/")[2]
                    return int(total) if total.isdecimal() else None
                if response.status_code < 400:  # the server does not support ranges
                    return _content_length(response)
        except requests.RequestException as error:
            raise _unreachable(url, error) from error
        with self.get(url) as response:
            return _content_length(response)

    @contextmanager
    def get(self, url: str, headers: dict[str, str] | None = None) -> Iterator[requests.Response]:
        """Opens a response whose body is not read yet.

        The body is the whole file, or the part that `headers` ask for; if that part does not exist,
        the status is 416. Raises UserError if the request fails.
        """
        try:
            with self._request("GET", url, headers or {}) as response:
                if response.status_code != 416:
                    _check(url, response)
                yield response
        except requests.RequestException as error:
            raise _unreachable(url, error) from error

    def _request(self, method: str, url: str, headers: dict[str, str]) -> requests.Response:
        return self._session().request(
            method, url, headers=headers, stream=True, timeout=self._timeout, allow_redirects=True
        )

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = requests.Session()
            # Sizes, ranges and checksums are those of the file, not of a compressed response.
            session.headers["Accept-Encoding"] = "identity"
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(max_retries=self._retry))
        return session


def _content_length(response: requests.Response) -> int | None:
    length = response.headers.get("Content-Length")
    return int(length) if length else None


def _check(url: str, response: requests.Response) -> None:
    status = response.status_code
    if status in (404, 410):
        raise UserError(f"{url} does not exist (status {status}); correct it in the config")
    if status in (401, 403):
        raise UserError(
            f"{url} may not be read (status {status}): it needs a login, or it is a signed URL "
            "that has expired"
        )
    if status >= 400:
        raise UserError(f"{url}: the server answers with status {status}; try again later")


def _unreachable(url: str, error: requests.RequestException) -> UserError:
    reason = error.args[0] if error.args else error
    reason = getattr(reason, "reason", reason)  # urllib3's MaxRetryError has the last failure here
    return UserError(f"{url} cannot be reached: {reason}; run the same command again to resume")
