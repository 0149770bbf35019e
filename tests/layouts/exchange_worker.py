"""One rank of three that fetch rows from each other; started by test_exchange.py.

Every rank knows the whole tables, so each checks its own rows and gradients against indexing.
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist

ROWS, COLUMNS = (11, 4, 2), (6, 3, 4)  # of three tables; the last has fewer rows than ranks
ASKED = {
    "some of each": [
        [[0, 3, 10], [1], [0, 1]],
        [[3, 4], [0, 1, 2, 3], [1]],
        [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [2], [0]],
    ],
    "one rank asks for nothing": [
        [[], [], []],
        [[5], [3], [1]],
        [[5, 6], [3], [1]],
    ],
    "one rank is asked for nothing": [
        [[0, 1], [0], [0]],
        [[0], [0], [0]],
        [[1], [0], [0]],
    ],
    "nobody asks": [[[], [], []], [[], [], []], [[], [], []]],
}
"""By case, for each rank and each table: the rows that it needs."""


def tables() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(n, d, generator=generator, dtype=torch.float64) for n, d in zip(ROWS, COLUMNS)
    ]


def upstream(rank: int, shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def check(asked: list[list[list[int]]], by_columns: bool) -> None:
    from gengram_megatron.engine.model.gengram.tables import FetchRows, RowPlan, first_row

    rank, size, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    own_rows = [slice(first_row(n, rank, size), first_row(n, rank + 1, size)) for n in ROWS]
    shards = [t[own].clone().requires_grad_() for t, own in zip(tables(), own_rows)]
    width = [1, 1, 1] if by_columns else None
    plan = RowPlan.negotiate([torch.tensor(a, dtype=torch.long) for a in asked[rank]], ROWS, group)
    found = FetchRows.apply(plan, width, *shards)

    def columns_of(r: int) -> slice:
        return slice(r, r + 1) if by_columns else slice(None)

    whole = [t.requires_grad_() for t in tables()]
    for t, rows in enumerate(found):
        assert torch.equal(rows, whole[t][asked[rank][t], columns_of(rank)])
    torch.autograd.backward(found, [upstream(rank, rows.shape) for rows in found])
    for r in range(size):  # what every rank sends back, added up on whole tables
        theirs = [whole[t][asked[r][t], columns_of(r)] for t in range(len(ROWS))]
        torch.autograd.backward(theirs, [upstream(r, rows.shape) for rows in theirs])
    for shard, full, own in zip(shards, whole, own_rows):
        torch.testing.assert_close(shard.grad, full.grad[own], rtol=0, atol=1e-14)


def run(folder: Path) -> None:
    """All cases, both ways of cutting columns."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    for case in ASKED.values():
        check(case, by_columns=False)
        check(case, by_columns=True)
    dist.destroy_process_group()
