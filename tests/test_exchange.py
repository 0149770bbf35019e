"""Rows fetched from other ranks, and their gradients, against indexing the whole tables: empty
peers, rows that several ranks ask for, tables with fewer rows than ranks."""

from tests.layouts.launch import launch


def test_rows_and_gradients_of_three_ranks() -> None:
    launch(3, "tests/layouts/exchange_worker.py")
