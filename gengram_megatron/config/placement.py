"""How each memory table is split over the ranks, and why.

By columns: a tensor-parallel rank holds d / tensor columns of every row; nothing is communicated to
look a row up, but each rank of a data-parallel group has a copy. By rows: a rank holds a run of
rows, and rows are fetched from the ranks that hold them; over the data- or expert-parallel group,
no rank holds a whole table, its gradient or its optimizer states.
"""

from dataclasses import dataclass
from typing import Literal

from gengram_megatron.config.schema import Config
from gengram_megatron.config.tables import KmerTable, kmer_tables

SMALL_K = 6  # the paper's largest; 288 MB at d_m 1024, at 18 bytes a parameter
LARGE_BYTES = 2**30


@dataclass(frozen=True)
class Placement:
    """over: the group whose ranks share the rows; None: split by columns."""

    table: KmerTable
    over: Literal["tensor", "expert", "data"] | None
    reason: str

    @property
    def split(self) -> str:
        """As the config's key has it."""
        return "columns" if self.over is None else "rows"

    def columns_held(self, tensor: int) -> int:
        """Columns that each of so many tensor-parallel ranks holds: all where they share rows."""
        return self.table.columns if self.over == "tensor" else self.table.columns // tensor


def placements(config: Config, world_size: int) -> tuple[Placement, ...]:
    """Of all tables of a layer. The config is one that check_layout accepts."""
    return tuple(_place(table, config, world_size) for table in kmer_tables(config.model.gengram))


def _place(table: KmerTable, config: Config, world_size: int) -> Placement:
    gengram = config.model.gengram
    over = gengram.rows_over or "data"
    ranks = group_sizes(config, world_size)[over]
    if gengram.split == "columns":
        return Placement(table, None, "gengram.split is columns")
    if config.train.engine == "deepspeed":
        return Placement(table, None, "DeepSpeed shares tables as it does all weights")
    if gengram.split == "auto" and table.k <= SMALL_K:
        return Placement(table, None, f"k is at most {SMALL_K}")
    if ranks == 1:
        return Placement(table, None, f"there is one {over}-parallel rank")
    if table.rows < ranks:
        return Placement(table, None, f"{table.rows} rows for {ranks} {over}-parallel ranks")
    if gengram.split == "rows":
        return Placement(table, over, "gengram.split is rows")
    size = bytes_by_columns(table, config, world_size)
    gib = f"{size / 2**30:.2f} GiB a rank"
    if size < LARGE_BYTES:
        return Placement(table, None, f"by columns {gib}")
    return Placement(table, over, f"by columns {gib}")


def bytes_by_columns(table: KmerTable, config: Config, world_size: int) -> int:
    """Weights, float32 gradients and Adam's states of a rank, were the table split by columns."""
    parameters = table.rows * table.columns // config.parallel.tensor
    bf16 = config.train.dtype == "bf16"
    states = 12 if bf16 else 8  # two moments, and the float32 weights of bf16 ones
    copies = group_sizes(config, world_size)["data"] if config.optimizer.distributed else 1
    return parameters * ((2 if bf16 else 4) + 4) + parameters * states // copies


def group_sizes(config: Config, world_size: int) -> dict[str, int]:
    """Ranks that rows can be shared by. Context-parallel ranks count as data-parallel ones: both
    hold copies of the weights."""
    parallel = config.parallel
    return {
        "tensor": parallel.tensor,
        "expert": parallel.expert,
        "data": world_size // (parallel.tensor * parallel.pipeline),
    }
