"""This rank's parts of a layer's tables, and the look-up of the rows that its tokens need.

However a table is split, the look-up gives a rank d / tp columns of each row that it needs, and the
checkpoint contains whole tables.

Rows of tables that are split by rows are fetched from the ranks that hold them. Each rank requests
each distinct row that its tokens need once, and sends the rows that other ranks request from it.
Row ids depend only on the tokens, so the ranks exchange their requests once per microbatch
(`RowPlan`), for all layers; each layer then exchanges rows, and in the backward pass gradients.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from gengram_megatron.config.tables import Placement
from gengram_megatron.engine.model.gengram.ids import KmerIds
from gengram_megatron.engine.model.gengram.shape import GengramShape
from gengram_megatron.engine.model.initialize import InitDistribution, init_tag, mark, split_weight
from gengram_megatron.engine.model.sequence import TokenRange


def first_row(rows: int, rank: int, size: int) -> int:
    """Returns the first row of a table that `rank` holds of `size` ranks. For rank == size it is
    `rows`, the end of the last rank's rows."""
    return rows * rank // size


@dataclass(frozen=True)
class RowPlan:
    """The rows of several tables that this rank receives from, and sends to, the ranks of a group.

    recv_counts[t][r]: the number of rows of table t that rank r sends to this rank.
    send_counts[t][r]: the number of rows of table t that this rank sends to rank r.
    local_rows[t]: the indices, within this rank's shard of table t, of the rows that it sends,
        grouped by receiving rank.
    """

    recv_counts: list[list[int]]
    send_counts: list[list[int]]
    local_rows: list[Tensor]
    group: dist.ProcessGroup

    @classmethod
    def negotiate(
        cls, needed: list[Tensor], rows: list[int], group: dist.ProcessGroup
    ) -> "RowPlan":
        """Exchanges requests with the group; all of its ranks must call this together.

        needed[t]: the distinct rows of table t that this rank needs, in ascending order.
        rows[t]: the number of rows of the whole table t.
        """
        size, rank = group.size(), group.rank()
        boundaries = [
            torch.tensor([first_row(n, r, size) for r in range(1, size)], device=indices.device)
            for n, indices in zip(rows, needed)
        ]
        receive = torch.stack(
            [
                torch.bucketize(indices, bounds, right=True).bincount(minlength=size)
                for indices, bounds in zip(needed, boundaries)
            ]
        )
        send = torch.empty_like(receive.t().contiguous())
        dist.all_to_all_single(send, receive.t().contiguous(), group=group)
        recv_counts, send_counts = receive.tolist(), send.t().tolist()
        requested = exchange(needed, recv_counts, send_counts, group)
        local_rows = [indices - first_row(n, rank, size) for n, indices in zip(rows, requested)]
        return cls(recv_counts, send_counts, local_rows, group)


class FetchRows(torch.autograd.Function):
    """Fetches the rows that a plan requests, table by table, from the shards that the ranks hold.

    columns[t]: the number of columns of table t that each rank gets, if ranks get different columns
    (the group is tensor-parallel, and shards hold all columns); None: all columns of the shards.
    """

    @staticmethod
    def forward(
        ctx: Any, plan: RowPlan, columns: list[int] | None, *shards: Tensor
    ) -> tuple[Tensor, ...]:
        """Returns for each table the fetched rows, grouped by the rank that sent them."""
        ctx.plan, ctx.columns = plan, columns
        ctx.shapes = [shard.shape for shard in shards]
        outgoing = [shard[local_rows] for shard, local_rows in zip(shards, plan.local_rows)]
        if columns is not None:
            outgoing = [
                _split_columns(rows, counts, width)
                for rows, counts, width in zip(outgoing, plan.send_counts, columns)
            ]
        return tuple(exchange(outgoing, plan.send_counts, plan.recv_counts, plan.group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Returns for each shard the sum of the gradients of the rows that it sent."""
        plan = ctx.plan
        received = exchange(list(grads), plan.recv_counts, plan.send_counts, plan.group)
        shards = []
        for t, (grad, local_rows, shape) in enumerate(zip(received, plan.local_rows, ctx.shapes)):
            if ctx.columns is not None:
                grad = _join_columns(grad, plan.send_counts[t], shape[1])
            wide = torch.promote_types(grad.dtype, torch.float32)
            # Sums what several ranks send for one row, always in the same order.
            total = torch.ops.aten.embedding_dense_backward(
                grad.to(wide), local_rows, shape[0], -1, False
            )
            shards.append(total.to(grad.dtype))
        return None, None, *shards


def exchange(
    tensors: list[Tensor],
    send_counts: list[list[int]],
    recv_counts: list[list[int]],
    group: dist.ProcessGroup,
) -> list[Tensor]:
    """Exchanges rows with all ranks of the group, in one collective for all tables.

    tensors[t]: [rows, ...], first the send_counts[t][0] rows for rank 0, and so on. Returns the
    received rows in the same form, recv_counts[t][r] of them from rank r.
    """
    size = group.size()
    split = [x.split(counts) for x, counts in zip(tensors, send_counts)]
    outgoing = torch.cat([part[r].flatten() for r in range(size) for part in split])
    widths = [math.prod(x.shape[1:]) for x in tensors]
    out_sizes = [sum(part[r].numel() for part in split) for r in range(size)]
    in_counts = [[n * width for n in counts] for counts, width in zip(recv_counts, widths)]
    in_sizes = [sum(counts[r] for counts in in_counts) for r in range(size)]
    incoming = outgoing.new_empty(sum(in_sizes))
    dist.all_to_all_single(incoming, outgoing, in_sizes, out_sizes, group=group)
    by_rank = incoming.split([counts[r] for r in range(size) for counts in in_counts])
    return [
        torch.cat(by_rank[t :: len(tensors)]).view(-1, *x.shape[1:]) for t, x in enumerate(tensors)
    ]


def _split_columns(rows: Tensor, counts: list[int], width: int) -> Tensor:
    """Selects for each rank its columns of the rows that it requested: [n, d] -> [n, width]."""
    parts = rows.split(counts)
    return torch.cat([part[:, r * width : (r + 1) * width] for r, part in enumerate(parts)])


def _join_columns(grads: Tensor, counts: list[int], total: int) -> Tensor:
    """Applies the adjoint of `_split_columns`: [n, width] -> [n, d], zero in the columns of other
    ranks."""
    whole, start, width = grads.new_zeros((len(grads), total)), 0, grads.shape[1]
    for r, n in enumerate(counts):
        whole[start : start + n, r * width : (r + 1) * width] = grads[start : start + n]
        start += n
    return whole


class _Weights(nn.Module):
    """Holds the tables by name. For a look-up, a table must be obtained by calling this module:
    with overlap_param_gather, megatron-core waits for the all-gather of a module's updated weights
    when the module is called, and a table that is read as an attribute might be out of date."""

    def __init__(self, tables: dict[str, nn.Parameter]):
        super().__init__()
        for name, table in tables.items():
            self.register_parameter(name, table)

    def forward(self, name: str) -> nn.Parameter:
        return self[name]

    def __getitem__(self, name: str) -> nn.Parameter:
        return self.get_parameter(name)


class Tables(nn.Module):
    """A layer's tables; weights["k6"] is this rank's part of the table of 6-mers."""

    def __init__(
        self,
        config: TransformerConfig,
        gengram: GengramShape,
        pg_collection: ProcessGroupCollection,
    ):
        super().__init__()
        self.shape, self.groups = gengram, pg_collection
        self.weights = _Weights(
            {
                placement.table.name: self._parameter(config, placement)
                for placement in gengram.placements
            }
        )

    def forward(
        self, kmers: KmerIds, ranges: list[TokenRange]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns, for each table, the rows that the windows of `ranges` need, [n, columns / tp],
        and the index of each k-mer's row among them, [b, s]; n if the k-mer is not valid."""
        rows = [self.weights(placement.table.name) for placement in self.shape.placements]
        ids = list(kmers.ids)
        # The tables of which other ranks hold rows.
        remote = [i for i, placement in enumerate(self.shape.placements) if placement.rows_over]
        if remote:
            plan, indices = self._plan(kmers, ranges, remote)
            fetched = FetchRows.apply(plan, self._columns(remote), *[rows[i] for i in remote])
            for i, table_rows, table_indices in zip(remote, fetched, indices):
                # If no k-mer is valid, pad with a row of zeros for ids to point at. Padding keeps
                # the graph connected to FetchRows, whose backward pass all ranks must run together.
                rows[i] = table_rows if len(table_rows) else F.pad(table_rows, (0, 0, 0, 1))
                ids[i] = table_indices
        return rows, ids

    def _plan(
        self, kmers: KmerIds, ranges: list[TokenRange], remote: list[int]
    ) -> tuple[RowPlan, list[Tensor]]:
        """Returns the plan for the tables `remote`, and for each of them the index of each k-mer's
        row among the fetched rows, [b, s]. The first layer that processes a microbatch computes
        them, and the other layers reuse them."""
        if not kmers.plans:
            needed, indices = [], []
            for i in remote:
                table = self.shape.placements[i].table
                table_rows, table_indices = _distinct(
                    kmers.ids[i], table.rows, self.shape.pooling.span(table.k), ranges
                )
                needed.append(table_rows)
                indices.append(table_indices)
            rows = [self.shape.placements[i].table.rows for i in remote]
            group = self._rows_group(self.shape.placements[remote[0]])
            kmers.plans.append((RowPlan.negotiate(needed, rows, group), indices))
        plan: tuple[RowPlan, list[Tensor]] = kmers.plans[0]
        return plan

    def _columns(self, remote: list[int]) -> list[int] | None:
        """Returns the number of columns that each rank of a tensor-parallel group gets; None in
        other groups, whose ranks get all columns of the shards."""
        placements = [self.shape.placements[i] for i in remote]
        if placements[0].rows_over != "tensor":
            return None
        return [placement.table.columns // self.groups.tp.size() for placement in placements]

    def _rows_group(self, placement: Placement) -> dist.ProcessGroup:
        """Returns the group that the rows of a table are split over."""
        groups: dict[str | None, dist.ProcessGroup] = {
            "tensor": self.groups.tp,
            "expert": self.groups.ep,
            "data": self.groups.dp_cp,
        }
        return groups[placement.rows_over]

    def _local(self, placement: Placement) -> tuple[tuple[int, int], tuple[int, int]]:
        """Returns the shape of this rank's part of a table, and its first row and column."""
        table, tp = placement.table, self.groups.tp
        first, last, columns = 0, table.rows, placement.columns_held(tp.size())
        if placement.rows_over is not None:
            group = self._rows_group(placement)
            first, last = (
                first_row(table.rows, r, group.size()) for r in (group.rank(), group.rank() + 1)
            )
        column = 0 if placement.rows_over == "tensor" else tp.rank() * columns
        return (last - first, columns), (first, column)

    def _parameter(self, config: TransformerConfig, placement: Placement) -> nn.Parameter:
        axis = 0 if placement.rows_over == "tensor" else 1
        init_method = init_tag(InitDistribution(std=self.shape.init_std))
        table = split_weight(self._local(placement)[0], axis, config, init_method)
        # It may have its own learning rate and weight decay.
        mark(table, is_gengram_table=True)
        # Ranks that hold different rows must not sum their gradients (model/data_parallel.py).
        rows_over = placement.rows_over if placement.rows_over in ("expert", "data") else None
        mark(table, rows_over=rows_over, allreduce=rows_over is None)
        return table

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, ShardedTensor]:
        """Returns the sharded state: each table is one global tensor, however it is split."""
        state = {}
        for placement in self.shape.placements:
            name = placement.table.name
            key, table = f"{prefix}weights.{name}", self.weights[name]
            state[key] = ShardedTensor(
                key=key,
                data=table,
                dtype=table.dtype,
                local_shape=tuple(table.shape),
                global_shape=(placement.table.rows, placement.table.columns),
                global_offset=self._local(placement)[1],
                axis_fragmentations=None,
                replica_id=(0, 0, self._replica(placement)),
            )
        return state

    def _replica(self, placement: Placement) -> int:
        """Returns the number of this rank among those that hold copies of the same part."""
        if placement.rows_over == "data":
            return 0
        copies = self.groups.expt_dp if placement.rows_over == "expert" else self.groups.dp_cp
        return int(copies.rank())


def _distinct(ids: Tensor, rows: int, span: int, ranges: list[TokenRange]) -> tuple[Tensor, Tensor]:
    """Returns the distinct valid rows that the windows of `ranges` look up, in ascending order, and
    for each k-mer the index of its row among them, [b, s]. The index is one past the last for
    k-mers that are not valid or lie in no such window. ids: [b, s]; rows: of the whole table."""
    slices = [slice(max(r.start - span + 1, 0), r.stop) for r in ranges]
    distinct, inverse = torch.unique(
        torch.cat([ids[:, positions] for positions in slices], dim=1), return_inverse=True
    )
    num_valid = int((distinct < rows).sum())
    indices = torch.full_like(ids, num_valid)
    for positions, part in zip(slices, inverse.split([s.stop - s.start for s in slices], dim=1)):
        indices[:, positions] = part.to(ids.dtype)
    return distinct[:num_valid].long(), indices
