"""The pairs of layouts: one that writes a checkpoint, and one that goes on from it."""

from dataclasses import dataclass
from pathlib import Path

from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config

BEFORE, AFTER = 3, 5
"""Steps before the checkpoint, and after it."""

# name: (processes, settings)
LAYOUTS = {
    "one": (1, ()),
    "tp2": (2, ("parallel.tensor=2",)),
    "tp2_pp2": (4, ("parallel.tensor=2", "parallel.pipeline=2")),
    "tp2_ep2": (4, ("parallel.tensor=2", "parallel.expert=2")),
    "pp2": (2, ("parallel.pipeline=2",)),
    "pp2_uneven": (2, ("parallel.pipeline=2", "parallel.first_stage_layers=1")),
    "pp2_vpp2": (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    "pp4": (4, ("parallel.pipeline=4",)),
    "ep4": (4, ("parallel.expert=4",)),
    "ep2": (2, ("parallel.expert=2",)),
    "dp2": (2, ()),
    "dp4": (4, ()),
    "cp2": (2, ("parallel.context=2",)),
}

PLAIN, BF16 = "optimizer.distributed=false", "train.precision=bf16"
TABLES = "optimizer.tables={lr_multiplier: 3, weight_decay: 0}"
HASHED = (
    "model.gengram.kmer_sizes=[1, 6, 11]",
    "model.gengram.hashing={rows: 5000, heads: 2}",
    "model.gengram.share_reverse_complements=true",
    # The square root's slope has a pole at zero, and with these tables some gates come near it:
    # rounding alone would show after a few steps.
    "model.gengram.signed_sqrt=false",
)
BIAS = ("model.gengram.projection_bias=true",)
DATA, EXPERT, TENSOR = (
    ("model.gengram.split=rows", f"model.gengram.rows_over={group}")
    for group in ("data", "expert", "tensor")
)


@dataclass(frozen=True)
class Side:
    """A run on one layout, with settings of its own."""

    layout: str
    settings: tuple[str, ...] = ()

    @property
    def processes(self) -> int:
        return LAYOUTS[self.layout][0]


@dataclass(frozen=True)
class Pair:
    """Settings that both have, the one that writes, and the one that reads."""

    shared: tuple[str, ...]
    source: Side
    target: Side

    @property
    def source_name(self) -> str:
        """The same for pairs that go on from one checkpoint."""
        words = (self.source.layout, *self.source.settings, *self.shared)
        return "_".join("".join(c if c.isalnum() else "-" for c in word) for word in words)

    def config(self, file: Path, side: Side, folder: Path) -> Config:
        words = [*LAYOUTS[side.layout][1], *side.settings, *self.shared, f"run.dir={folder}"]
        common = [TABLES, f"train.steps={BEFORE + AFTER}", "optimizer.warmup_fraction=0.5"]
        return load_config(file, [*common, *words], Config)


def pair(source: str, target: str, *shared: str) -> Pair:
    return Pair(shared, Side(source), Side(target))


PAIRS = {
    "tp2_pp2_to_one": pair("tp2_pp2", "one"),
    "one_to_tp2_ep2": pair("one", "tp2_ep2"),
    "pp4_to_pp2": pair("pp4", "pp2"),
    "pp2_uneven_to_dp2": pair("pp2_uneven", "dp2"),
    "one_to_ep4": pair("one", "ep4"),
    "dp4_to_dp2": pair("dp4", "dp2"),
    "vpp_to_one": pair("pp2_vpp2", "one"),
    "one_to_vpp": pair("one", "pp2_vpp2"),
    "cp2_to_tp2": pair("cp2", "tp2", *BIAS),
    "ep2_to_itself": pair("ep2", "ep2"),
    "columns_to_rows": Pair((), Side("tp2"), Side("dp4", DATA)),
    "rows_to_columns": Pair((), Side("dp4", DATA), Side("tp2")),
    "rows_over_expert_to_tensor": Pair((), Side("ep2", EXPERT), Side("tp2", TENSOR)),
    "hashed": pair("tp2", "pp2", *HASHED, *BIAS),
    "hashed_rows_to_columns": Pair(HASHED, Side("dp2", DATA), Side("tp2")),
    "bf16_dp4_to_tp2": pair("dp4", "tp2", BF16),
    "plain_to_plain": pair("dp2", "tp2_pp2", PLAIN),
    "plain_to_distributed": Pair((), Side("tp2", (PLAIN,)), Side("dp2")),
    "bf16_plain_to_distributed": Pair((BF16,), Side("dp2", (PLAIN,)), Side("dp4")),
    "bf16_distributed_to_plain": Pair((BF16,), Side("dp4"), Side("dp2", (PLAIN,))),
}
