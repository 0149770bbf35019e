"""model.gengram.project: what auto chooses, and what tables refuses."""

import pytest

from gengram_megatron.config.layout import check_layout, projected_table_bytes
from gengram_megatron.config.schema import Config
from gengram_megatron.errors import UserError
from gengram_megatron.plan import plan
from gengram_megatron.plan.memory import peak_rank
from gengram_megatron.plan.stages import ShardedModel
from gengram_megatron.plan.time import Speed
from tests.training.tiny import RUN

ROWS_A_TABLE = (5 + 25 + 125 + 625 + 3125 + 15625) // 6


def config_of(gengram: dict, samples: int = 8, **optimizer) -> Config:
    model = {**RUN["model"], "gengram": {**RUN["model"]["gengram"], **gengram}}
    return Config.model_validate(
        {
            **RUN,
            "run": {"dir": "unused"},
            "model": model,
            "data": {"path": "unused"},
            "optimizer": optimizer,
            "train": {**RUN["train"], "global_batch_size": samples},
        }
    )


def chosen(config: Config, processes: int = 1, on_gpu: bool = False) -> str:
    return check_layout(config, processes).projection(on_gpu).input


def test_auto_takes_tables_where_a_rank_has_more_tokens_than_a_table_has_rows() -> None:
    more = ROWS_A_TABLE // 64 + 2  # samples of 64 tokens, an even number
    more += more % 2
    assert chosen(config_of({}, more - 2)) == "features"
    assert chosen(config_of({}, more)) == "tables"
    assert chosen(config_of({}, more * 2), processes=2) == "tables"
    assert chosen(config_of({}, more * 2), processes=4) == "features"


@pytest.mark.parametrize(
    ("gengram", "optimizer"),
    [
        ({"kmer_sizes": [1, 2, 4]}, {}),
        ({"kmer_sizes": [1, 2, 3, 4, 5, 6, 12]}, {}),
        ({"kmer_sizes": [1, 2, 3, 4, 5, 6, 7]}, {}),
        ({"share_reverse_complements": True}, {}),
        ({"deduplicate": True}, {}),
        ({"split": "rows"}, {}),
        ({}, {"overlap_grad_reduce": True}),
    ],
    ids=str,
)
def test_auto_takes_features_where_tables_are_refused(gengram: dict, optimizer: dict) -> None:
    assert chosen(config_of(gengram, 800, **optimizer)) == "features"
    with pytest.raises(UserError) as refused:
        check_layout(config_of({**gengram, "project": "tables"}, 800, **optimizer), 1)
    (key,) = gengram or optimizer
    assert "model.gengram.project is tables, but" in str(refused.value)
    assert key in str(refused.value) or "model.gengram.split" in str(refused.value)


def test_an_explicit_choice_is_kept() -> None:
    assert chosen(config_of({"project": "tables"}), on_gpu=True) == "tables"
    assert chosen(config_of({"project": "features"}, 800)) == "features"


def test_auto_takes_features_on_gpus() -> None:
    assert chosen(config_of({}, 800), on_gpu=True) == "features"


@pytest.mark.parametrize("sizes", [[1], [1, 2], [1, 2, 3, 4, 5, 6]], ids=str)
@pytest.mark.parametrize("window", [None, 21])
def test_a_plan_counts_the_buffers_that_there_are(sizes: list[int], window: int | None) -> None:
    from gengram_megatron.engine.model.gengram.pooling import Pooling
    from gengram_megatron.engine.model.gengram.projected import FoldedRows

    settings = {"kmer_sizes": sizes, "window": window, "project": "tables"}
    rows = FoldedRows(max(sizes), Pooling(window)).total
    config = config_of(settings)
    assert projected_table_bytes(config) == 2 * rows * 2 * RUN["model"]["hidden_size"] * 4

    def buffers(project: str) -> int:
        changed = config_of({**settings, "project": project})
        return peak_rank(ShardedModel(changed, check_layout(changed, 1))).buffers

    assert buffers("tables") - buffers("features") == 2 * projected_table_bytes(
        config
    )  # two layers


def test_a_plan_counts_what_auto_chooses_on_each_kind_of_machine() -> None:
    config = config_of({}, 800)
    layout = check_layout(config, 1)
    on_cpu, on_gpu = (plan(config, layout, Speed(), 80, on_gpu=there) for there in (False, True))
    assert [one["projection"]["of"] for one in (on_cpu, on_gpu)] == ["tables", "features"]
    buffers = [one["memory_bytes_per_rank"]["buffers"] for one in (on_cpu, on_gpu)]
    assert buffers[0] - buffers[1] == 2 * projected_table_bytes(config)
