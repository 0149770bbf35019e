"""The part of a file that has come so far, and which version of the file it belongs to."""

import json
import re
from pathlib import Path

import requests
from urllib3.exceptions import ProtocolError


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
