"""The short runs that test_training.py looks at, by number of processes.

Each is a name and what differs from the tiny run. All of them go to a folder of their own name,
unless they say otherwise; FOLDER is where all of them lie.
"""

from tests.training.tiny import DENSE, MHA, MLA

# Six steps on eight fragments, all of them in every step.
OVERFIT = ("train.steps=6", "data.path=FOLDER/few", "optimizer.lr=0.02", "checkpoint.at_end=false")
MODELS = {
    "moe_gqa": (),
    "moe_mla": MLA,
    "dense_mha": (*DENSE, *MHA),
    "dense_mla": (*DENSE, *MLA),
}
BF16 = ("train.precision=bf16",)
RECOMPUTED = ("moe_gqa", "dense_mla")

# Four steps with settings of their own for the tables, validated twice.
TABLES = "optimizer.tables={lr_multiplier: 3, weight_decay: 0}"
SHORT = (TABLES, "train.validation_interval=2")
PLAIN = ("optimizer.distributed=false",)
REDUCE = ("optimizer.overlap_grad_reduce=true",)
GATHER = (*REDUCE, "optimizer.overlap_param_gather=true")
ROWS = ("model.gengram.split=rows",)
VPP = ("parallel.pipeline=2", "parallel.virtual_pipeline=2")

# The first step of a warm-up has a learning rate of 0: what is validated are the initial weights.
INITIAL = ("train.steps=1", "optimizer.warmup_fraction=0.5", "checkpoint.at_end=false")

SCHEDULE = (
    *DENSE,
    "train.steps=10",
    "train.global_batch_size=4",
    "optimizer={lr: 0.01, min_lr: 0.001, warmup_fraction: 0.25, decay_fraction: 0.75}",
    TABLES,
)

# Two heads of about 2^24 rows each, in two layers.
LARGE = (
    "train.steps=3",
    "model.gengram.kmer_sizes=[1, 12]",
    "model.gengram.dim=4",
    "model.gengram.hashing={rows: 16777216, heads: 2}",
    "model.gengram.split=rows",
    "checkpoint.at_end=false",
)

# Steps too small to learn anything in, as many as it takes to be told so.
STUCK = (
    *DENSE,
    "train.steps=101",
    "train.global_batch_size=2",
    "model.num_layers=1",
    "model.gengram.enabled=false",
    "optimizer={lr: 1e-9, min_lr: 1e-9}",
    "checkpoint.at_end=false",
)

ALONE = {
    **{name: (*OVERFIT, *model) for name, model in MODELS.items()},
    **{f"{name}_bf16": (*OVERFIT, *MODELS[name], *BF16) for name in RECOMPUTED},
    **{
        f"{name}_{recompute}": (*OVERFIT, *MODELS[name], f"train.recompute={recompute}")
        for name in RECOMPUTED
        for recompute in ("selective", "full")
    },
    "alone": (*SHORT, *PLAIN),
    "not_validated": (TABLES, *PLAIN),
    "cut": (*SHORT, *PLAIN, "train.stop_at=2"),
    "cut_on": (*SHORT, *PLAIN, "run.dir=FOLDER/cut"),
    "initial": INITIAL,
    "schedule": SCHEDULE,
    "changed": (*SCHEDULE, "train.stop_at=4"),
    "changed_on": (*SCHEDULE, "run.dir=FOLDER/changed", "optimizer.lr=0.02", "train.steps=12"),
    "only_warmup": (*DENSE, "train.steps=2", "optimizer.warmup_fraction=1"),
    "stuck": STUCK,
    "no_data": ("data.path=/nowhere/dna",),
}
TWO = {
    "dp2": SHORT,
    "dp2_reduce": (*SHORT, *REDUCE),
    "dp2_gather": (*SHORT, *GATHER),
    "dp2_rows": (*SHORT, *ROWS),
    "dp2_rows_plain": (*SHORT, *PLAIN, *ROWS),
    "dp2_2_24_rows": LARGE,
    "dp2_initial": INITIAL,
    "pp2_initial": (*INITIAL, "parallel.pipeline=2"),
}
FOUR = {
    "tp2_dp2_projected": (*SHORT, "parallel.tensor=2", "model.gengram.project=tables"),
    "dp2_vpp2": (*SHORT, *VPP),
    "dp2_vpp2_reduce": (*SHORT, *VPP, *REDUCE),
    "dp2_vpp2_gather": (*SHORT, *VPP, *GATHER),
    "dp4_ep2_gather": (*SHORT, *GATHER, "parallel.expert=2"),
    "dp4_ep2_rows": (*SHORT, *GATHER, *ROWS, "parallel.expert=2", "model.gengram.rows_over=expert"),
    "dp4_ep2_rows_over_data": (*SHORT, *ROWS, "parallel.expert=2"),
    "dp2_vpp2_rows": (*SHORT, *VPP, *ROWS),
}
