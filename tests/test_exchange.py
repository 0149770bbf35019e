"""Rows fetched from other ranks, and their gradients, against indexing the whole tables: empty
peers, rows that several ranks ask for, tables with fewer rows than ranks."""

from pathlib import Path

from tests.layouts.exchange_worker import run
from tests.layouts.launch import launch


def test_rows_and_gradients_of_three_ranks(tmp_path: Path) -> None:
    launch(3, run, tmp_path)
