"""`downloads.json`: what a folder's files are and where they are from."""

import json
from pathlib import Path
from threading import Lock
from typing import Any

from gengram_megatron.errors import UserError
from gengram_megatron.files import replacing

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
