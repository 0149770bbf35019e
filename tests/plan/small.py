"""Small models for tests of what a step needs and sends."""

import torch

from gengram_megatron.config.layout import Layout, check_layout
from gengram_megatron.config.schema import Config

MODEL = {
    "hidden_size": 64,
    "num_layers": 3,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 256,
    "num_experts": 4,
    "seq_length": 256,
    "vocab_size": 32,
}
DENSE = {"num_experts": None}
MHA = {"attention": "mha", "num_query_groups": None}
SIZES = {"kv_lora_rank": 32, "qk_head_dim": 8, "qk_pos_emb_head_dim": 16, "v_head_dim": 24}
MLA = {"attention": "mla", "num_query_groups": None, "mla": SIZES}
MEMORY = {"gengram": {"enabled": True, "layers": [2], "dim": 16}}


def config_of(processes: int, model: dict, parallel: dict, recompute: str) -> tuple[Config, Layout]:
    """One of a test's cases."""
    config = Config.model_validate(
        {
            "run": {"dir": "unused"},
            "model": {**MODEL, **model},
            "parallel": parallel,
            "data": {"path": "unused"},
            "train": {
                "global_batch_size": max(2 * parallel.get("pipeline", 0), processes),
                "steps": 4,
                "precision": "fp32",
                "recompute": recompute,
            },
        }
    )
    return config, check_layout(config, processes)


def step(chunks, optimizer, config: Config, layout: Layout) -> None:
    """As the training loop makes one."""
    from gengram_megatron.engine.training.step import forward_backward

    length = config.model.seq_length + 1
    bases = torch.tensor([8, 5, 6, 7], dtype=torch.uint8)
    batches = [bases[torch.randint(0, 4, (1, length))] for _ in range(layout.num_microbatches)]
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    forward_backward(chunks, batches, config, layout, forward_only=False)
    optimizer.step()
