"""Rows of tables that are split by rows, fetched from the ranks that hold them.

Each rank asks for the distinct rows that its own tokens need, once each, and answers the others.
Addresses depend on the tokens alone, so who asks whom for what is settled once a microbatch
(`RowPlan`) and serves all layers; a layer then exchanges rows, and in the backward pass gradients.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


def first_row(rows: int, rank: int, size: int) -> int:
    """The first row that a rank holds of a table; a rank beyond the last: the number of rows."""
    return rows * rank // size


@dataclass(frozen=True)
class RowPlan:
    """What this rank asks of its group and the group of it, for several tables.

    wanted[t][r], given[t][r]: rows of table t that rank r sends here, and that go there.
    places[t]: which of the rows held here are given, rank after rank. group: whose ranks they are.
    """

    wanted: list[list[int]]
    given: list[list[int]]
    places: list[Tensor]
    group: dist.ProcessGroup

    @classmethod
    def agree(cls, addresses: list[Tensor], rows: list[int], group) -> "RowPlan":
        """addresses[t]: the distinct rows of table t that are needed here, rising; rows[t]: of the
        whole table. All ranks of the group call it together."""
        size, rank = group.size(), group.rank()
        borders = [
            torch.tensor([first_row(n, r, size) for r in range(1, size)], device=a.device)
            for n, a in zip(rows, addresses)
        ]
        wanted = torch.stack(
            [
                torch.bucketize(a, border, right=True).bincount(minlength=size)
                for a, border in zip(addresses, borders)
            ]
        )
        given = torch.empty_like(wanted.t().contiguous())
        dist.all_to_all_single(given, wanted.t().contiguous(), group=group)
        wanted, given = wanted.tolist(), given.t().tolist()
        asked = exchange(addresses, wanted, given, group)
        places = [a - first_row(n, rank, size) for n, a in zip(rows, asked)]
        return cls(wanted, given, places, group)


class FetchRows(torch.autograd.Function):
    """The rows that a plan asks for, table after table, from the shards that the ranks hold.

    columns[t]: how many columns each rank wants of table t, where each wants others (the group is
    tensor-parallel, and shards hold all columns); None: all that the shards hold.
    """

    @staticmethod
    def forward(ctx, plan: RowPlan, columns: list[int] | None, *shards: Tensor):
        ctx.plan, ctx.columns = plan, columns
        ctx.shapes = [shard.shape for shard in shards]
        found = [shard[places] for shard, places in zip(shards, plan.places)]
        if columns is not None:
            found = [_own_columns(x, g, w) for x, g, w in zip(found, plan.given, columns)]
        return tuple(exchange(found, plan.given, plan.wanted, plan.group))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        plan = ctx.plan
        received = exchange(list(grads), plan.wanted, plan.given, plan.group)
        shards = []
        for t, (grad, places, shape) in enumerate(zip(received, plan.places, ctx.shapes)):
            if ctx.columns is not None:
                grad = _all_columns(grad, plan.given[t], shape[1])
            wide = torch.promote_types(grad.dtype, torch.float32)
            # Adds what several ranks send for one row, in the same order every time.
            total = torch.ops.aten.embedding_dense_backward(
                grad.to(wide), places, shape[0], -1, False
            )
            shards.append(total.to(grad.dtype))
        return None, None, *shards


def exchange(
    tensors: list[Tensor], sent: list[list[int]], received: list[list[int]], group
) -> list[Tensor]:
    """tensors[t]: [rows, ...], first the sent[t][0] rows for rank 0, and so on; returns the same
    with received[t][r] rows from rank r. One collective for all tables."""
    size = group.size()
    split = [x.split(counts) for x, counts in zip(tensors, sent)]
    outgoing = torch.cat([part[r].flatten() for r in range(size) for part in split])
    widths = [math.prod(x.shape[1:]) for x in tensors]
    out_sizes = [sum(part[r].numel() for part in split) for r in range(size)]
    in_counts = [[n * width for n in counts] for counts, width in zip(received, widths)]
    in_sizes = [sum(counts[r] for counts in in_counts) for r in range(size)]
    incoming = outgoing.new_empty(sum(in_sizes))
    dist.all_to_all_single(incoming, outgoing, in_sizes, out_sizes, group=group)
    by_rank = incoming.split([counts[r] for r in range(size) for counts in in_counts])
    return [
        torch.cat(by_rank[t :: len(tensors)]).view(-1, *x.shape[1:]) for t, x in enumerate(tensors)
    ]


def _own_columns(rows: Tensor, counts: list[int], width: int) -> Tensor:
    """[n, d] -> [n, width]: for each rank its own columns of the rows that it asked for."""
    parts = rows.split(counts)
    return torch.cat([part[:, r * width : (r + 1) * width] for r, part in enumerate(parts)])


def _all_columns(grads: Tensor, counts: list[int], total: int) -> Tensor:
    """The adjoint: [n, width] -> [n, d], zeros in the columns of other ranks."""
    whole, start, width = grads.new_zeros((len(grads), total)), 0, grads.shape[1]
    for r, n in enumerate(counts):
        whole[start : start + n, r * width : (r + 1) * width] = grads[start : start + n]
        start += n
    return whole
