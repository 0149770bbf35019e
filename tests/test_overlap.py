"""optimizer.overlap_param_gather waits for a module's weights when the module is called."""

import pytest

from gengram_megatron.config.layout import with_gengram
from gengram_megatron.config.schema import Config
from tests.training.tiny import RUN

MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 8}
MODELS = {
    "moe_gqa": {},
    "dense_gqa": {"num_experts": None},
    "moe_mla": {"attention": "mla", "num_query_groups": None, "mla": {**MLA, "v_head_dim": 16}},
}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_every_module_with_weights_is_called(one_process, name: str, recompute: str) -> None:
    """One that is not, whose weights are read by another, would be used before they arrive."""
    from gengram_megatron.engine.model.build import build_model, wrap_for_data_parallelism
    from gengram_megatron.engine.training.optimizer import build_optimizer
    from gengram_megatron.engine.training.step import forward_backward
    from tests.layouts.worker import batch

    config = Config.model_validate(
        {
            **RUN,
            "run": {"dir": "unused", "seed": 5},
            "model": {**RUN["model"], **MODELS[name]},
            "data": {"path": "unused"},
            "train": {**RUN["train"], "recompute": recompute},
        }
    )
    chunks = wrap_for_data_parallelism(
        build_model(config, with_gengram(one_process, config)), config, one_process
    )
    build_optimizer(config, chunks)
    holders, called = set(), set()
    for path, module in chunks[0].module.named_modules():
        if [*module.parameters(recurse=False)]:
            holders.add(path)
            module.register_forward_pre_hook(lambda *_, path=path: called.add(path))
    micro = iter(batch(8, config.model.seq_length).split(8))
    forward_backward(chunks, micro, config, one_process, forward_only=True)
    assert len(holders) > 20
    assert called == holders
