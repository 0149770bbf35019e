"""This rank's parts of a layer's tables, and the look-up: the rows that its tokens need.

However a table is split, a rank ends up with d / tp columns of each row that it needs, and the
checkpoint holds whole tables.

Rows of tables that are split by rows are fetched from the ranks that hold them. Each rank asks for
the distinct rows that its own tokens need, once each, and answers the others. Row numbers depend on
the tokens alone, so who asks whom for what is settled once a microbatch (`RowPlan`) and serves all
layers; a layer then exchanges rows, and in the backward pass gradients.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor, nn

from gengram_megatron.config.tables import Placement
from gengram_megatron.engine.model.gengram.ids import KmerIds
from gengram_megatron.engine.model.gengram.shape import GengramShape
from gengram_megatron.engine.model.initialize import InitialLaw, init_tag, split_weight
from gengram_megatron.engine.model.sequence import TokenRange


def first_row(rows: int, rank: int, size: int) -> int:
    """The first row that a rank holds of a table; a rank beyond the last: the number of rows."""
    return rows * rank // size


@dataclass(frozen=True)
class RowPlan:
    """What this rank asks of its group and the group of it, for several tables.

    wanted[t][r], given[t][r]: rows of table t that rank r sends here, and that go there.
    places[t]: which of the rows held here are given, rank after rank. group: whose ranks they are.
    """

    recv_counts: list[list[int]]
    send_counts: list[list[int]]
    local_rows: list[Tensor]
    group: dist.ProcessGroup

    @classmethod
    def negotiate(cls, addresses: list[Tensor], rows: list[int], group) -> "RowPlan":
        """addresses[t]: the distinct rows of table t that are needed here, rising; rows[t]: of the
        whole table. All ranks of the group call it together."""
        size, rank = group.size(), group.rank()
        borders = [
            torch.tensor([first_row(n, r, size) for r in range(1, size)], device=a.device)
            for n, a in zip(rows, addresses)
        ]
        recv_counts = torch.stack(
            [
                torch.bucketize(a, border, right=True).bincount(minlength=size)
                for a, border in zip(addresses, borders)
            ]
        )
        send_counts = torch.empty_like(recv_counts.t().contiguous())
        dist.all_to_all_single(send_counts, recv_counts.t().contiguous(), group=group)
        recv_counts, send_counts = recv_counts.tolist(), send_counts.t().tolist()
        asked = exchange(addresses, recv_counts, send_counts, group)
        local_rows = [a - first_row(n, rank, size) for n, a in zip(rows, asked)]
        return cls(recv_counts, send_counts, local_rows, group)


class FetchRows(torch.autograd.Function):
    """The rows that a plan asks for, table after table, from the shards that the ranks hold.

    columns[t]: how many columns each rank wants of table t, where each wants others (the group is
    tensor-parallel, and shards hold all columns); None: all that the shards hold.
    """

    @staticmethod
    def forward(ctx, plan: RowPlan, columns: list[int] | None, *shards: Tensor):
        ctx.plan, ctx.columns = plan, columns
        ctx.shapes = [shard.shape for shard in shards]
        found = [shard[local_rows] for shard, local_rows in zip(shards, plan.local_rows)]
        if columns is not None:
            found = [_own_columns(x, g, w) for x, g, w in zip(found, plan.send_counts, columns)]
        return tuple(exchange(found, plan.send_counts, plan.recv_counts, plan.group))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        plan = ctx.plan
        received = exchange(list(grads), plan.recv_counts, plan.send_counts, plan.group)
        shards = []
        for t, (grad, local_rows, shape) in enumerate(zip(received, plan.local_rows, ctx.shapes)):
            if ctx.columns is not None:
                grad = _all_columns(grad, plan.send_counts[t], shape[1])
            wide = torch.promote_types(grad.dtype, torch.float32)
            # Adds what several ranks send for one row, in the same order every time.
            total = torch.ops.aten.embedding_dense_backward(
                grad.to(wide), local_rows, shape[0], -1, False
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


class _Weights(nn.Module):
    """The tables by name. What is looked up is asked for by a call: where updated weights are
    gathered while the forward pass goes on, megatron-core waits for those of a module when the
    module is called, and a table that is only read might still be the old one."""

    def __init__(self, tables: dict[str, nn.Parameter]):
        super().__init__()
        for name, table in tables.items():
            self.register_parameter(name, table)

    def forward(self, name: str) -> nn.Parameter:
        return self[name]

    def __getitem__(self, name: str) -> nn.Parameter:
        return getattr(self, name)


class Tables(nn.Module):
    """weights["k6"] is this rank's part of the table of 6-mers."""

    def __init__(self, config, gengram: GengramShape, pg_collection):
        super().__init__()
        self.shape, self.groups = gengram, pg_collection
        self.weights = _Weights(
            {place.table.name: self._parameter(config, place) for place in gengram.placements}
        )

    def forward(
        self, kmers: KmerIds, pieces: list[TokenRange]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The rows that the windows of `pieces` need, [n, columns / tp] a table, and the place of
        each k-mer's row among them, [b, s] a table; not valid: n."""
        rows = [self.weights(place.table.name) for place in self.shape.placements]
        ids = list(kmers.ids)
        remote = [i for i, place in enumerate(self.shape.placements) if place.over]
        if remote:
            plan, local_rows = self._plan(kmers, pieces, remote)
            fetched = FetchRows.apply(plan, self._columns(remote), *[rows[i] for i in remote])
            for i, found, place in zip(remote, fetched, local_rows):
                # Where nothing is valid: a row of zeros for ids to point at. It hangs on what was
                # fetched, as the backward pass is for all ranks to do together.
                rows[i] = found if len(found) else F.pad(found, (0, 0, 0, 1))
                ids[i] = place
        return rows, ids

    def _plan(
        self, kmers: KmerIds, pieces: list[TokenRange], remote: list[int]
    ) -> tuple[RowPlan, list[Tensor]]:
        """Made by the first layer that a microbatch meets, kept for the others."""
        if not kmers.plans:
            addresses, local_rows = [], []
            for i in remote:
                table = self.shape.placements[i].table
                recv_counts, place = _distinct(
                    kmers.ids[i], table.rows, self.shape.pooling.span(table.k), pieces
                )
                addresses.append(recv_counts)
                local_rows.append(place)
            rows = [self.shape.placements[i].table.rows for i in remote]
            group = self._rows_group(self.shape.placements[remote[0]])
            kmers.plans.append((RowPlan.negotiate(addresses, rows, group), local_rows))
        return kmers.plans[0]

    def _columns(self, remote: list[int]) -> list[int] | None:
        """Columns that each rank of a tensor-parallel group wants; in other groups all want those
        that are held."""
        local_rows = [self.shape.placements[i] for i in remote]
        if local_rows[0].over != "tensor":
            return None
        return [place.table.columns // self.groups.tp.size() for place in local_rows]

    def _rows_group(self, place: Placement):
        of = {"tensor": self.groups.tp, "expert": self.groups.ep, "data": self.groups.dp_cp}
        return of[place.over]

    def _local(self, place: Placement) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shape of this rank's part of a table, and its first row and column."""
        table, tp = place.table, self.groups.tp
        first, last, columns = 0, table.rows, place.columns_held(tp.size())
        if place.over is not None:
            group = self._rows_group(place)
            first, last = (
                first_row(table.rows, r, group.size()) for r in (group.rank(), group.rank() + 1)
            )
        column = 0 if place.over == "tensor" else tp.rank() * columns
        return (last - first, columns), (first, column)

    def _parameter(self, config, place: Placement) -> nn.Parameter:
        axis = 0 if place.over == "tensor" else 1
        drawn = init_tag(InitialLaw(std=self.shape.init_std))
        table = split_weight(self._local(place)[0], axis, config, drawn)
        table.is_gengram_table = True  # may have its own learning rate and weight decay
        # Data-parallel ranks hold different rows: their gradients are not to be added up
        # (model/data_parallel.py).
        table.rows_over = place.over if place.over in ("expert", "data") else None
        table.allreduce = table.rows_over is None
        return table

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None) -> dict:
        state = {}
        for place in self.shape.placements:
            name = place.table.name
            key, table = f"{prefix}weights.{name}", self.weights[name]
            state[key] = ShardedTensor(
                key=key,
                data=table,
                dtype=table.dtype,
                local_shape=tuple(table.shape),
                global_shape=(place.table.rows, place.table.columns),
                global_offset=self._local(place)[1],
                axis_fragmentations=None,
                replica_id=(0, 0, self._copy(place)),
            )
        return state

    def _copy(self, place: Placement) -> int:
        """Which of the copies of its part this rank holds."""
        if place.over == "data":
            return 0
        return (self.groups.expt_dp if place.over == "expert" else self.groups.dp_cp).rank()


def _distinct(ids: Tensor, rows: int, span: int, pieces: list[TokenRange]) -> tuple[Tensor, Tensor]:
    """The rows, rising and each once, that the windows of `pieces` look up, and for each k-mer its
    place among them; one past the last: not valid, or in no such window. ids: [b, s]."""
    needed = [slice(max(piece.start - span + 1, 0), piece.stop) for piece in pieces]
    here = torch.cat([ids[:, where] for where in needed], dim=1)
    found, inverse = torch.unique(here, return_inverse=True)
    valid = int((found < rows).sum())
    local_rows = torch.full_like(ids, valid)
    for where, part in zip(needed, inverse.split([w.stop - w.start for w in needed], dim=1)):
        local_rows[:, where] = part.to(ids.dtype)
    return found[:valid].long(), local_rows
