"""A small model with the same kinds of parts as a config's, to be built and looked at."""

from gengram_megatron.config.projection import Projection
from gengram_megatron.config.schema import Config, Gengram, Hashing, Model, Parallel

HIDDEN, HEADS, LENGTH, EXPERTS = 64, 4, 32, 2


def sample(config: Config, projection: Projection | None) -> Config:
    """One layer of it, on one process, with narrow weights.

    All that decides which implementation a part gets stays: kind of attention, experts or none,
    precision, optimizer, implementation. projection: of the whole run; None: it has no memory.
    """
    one_step = {"global_batch_size": 1, "micro_batch_size": 1, "steps": 1, "samples": None}
    return config.model_copy(
        update={
            "model": _model(config.model, projection),
            "parallel": Parallel(),
            "train": config.train.model_copy(update=one_step),
        }
    )


def _model(model: Model, projection: Projection | None) -> Model:
    dense = model.num_experts is None
    return model.model_copy(
        update={
            "hidden_size": HIDDEN,
            "num_layers": 1,
            "num_attention_heads": HEADS,
            "num_query_groups": HEADS // 2 if model.attention == "gqa" else None,
            "ffn_hidden_size": HIDDEN,
            "num_experts": None if dense else EXPERTS,
            "moe_router_topk": min(model.moe_router_topk, EXPERTS),
            "seq_length": LENGTH,
            "gengram": _memory(model.gengram, projection),
        }
    )


def _memory(gengram: Gengram, projection: Projection | None) -> Gengram:
    if projection is None:
        return gengram
    return gengram.model_copy(
        update={
            "layers": [1],
            "kmer_sizes": [1, 2],
            "hashing": Hashing(),
            "window": gengram.window and min(gengram.window, LENGTH),
            "dim": HIDDEN,
            "project": projection.of,
            "split": "columns",
            "rows_over": None,
        }
    )
