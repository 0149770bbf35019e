"""Fixtures of the download tests: a server, and the command in this process."""

import json
import sys
from pathlib import Path

import pytest

from data_prep import cli
from tests.download_server import Server


@pytest.fixture
def server():
    """A server without pages."""
    server = Server()
    yield server
    server.close()


@pytest.fixture
def download(tmp_path, monkeypatch, capsys):
    """Write a download list of some files and run the command; exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, **keys: object) -> tuple[int, str, str]:
        settings = {"output": "out", "backoff": 0, "retries": 3, **keys}
        Path("list.yaml").write_text(json.dumps(settings))  # JSON is YAML
        monkeypatch.setattr(sys, "argv", ["gengram-data", "download", "list.yaml", *words])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run
