"""Imported weights against those of the published model, to the bit."""

from pathlib import Path

import torch
from torch import Tensor

from gengram_megatron.config.schema import Config
from gengram_megatron.engine.checkpoint.stored import StoredTensors


def check_weights(checkpoint: Path, config: Config, gpt) -> None:
    """Every weight of an imported checkpoint is that of the published model, to the bit."""
    stored, theirs = StoredTensors(checkpoint), gpt.state_dict()

    def same(ours: str, expected: Tensor) -> bool:
        return torch.equal(stored.read(ours), expected)

    for name in stored.names:
        assert ".memory." in name or ".experts." in name or same(name, theirs[name])
    for number in range(config.model.num_layers):
        layer = f"decoder.layers.{number}."
        for expert in range(config.model.num_experts or 0):
            for name in ("linear_fc1", "linear_fc2"):
                all_experts = stored.read(f"{layer}mlp.experts.{name}.weight")
                one = theirs[f"{layer}mlp.experts.local_experts.{expert}.{name}.weight"]
                assert torch.equal(all_experts[expert].reshape(one.shape), one)
        memory, their_memory = f"{layer}memory.", f"{layer}gengram."
        if number + 1 not in config.model.gengram.layers:
            assert not any(name.startswith(memory) for name in stored.names)
            continue
        for place, k in enumerate(config.model.gengram.kmer_sizes):
            table = theirs[f"{their_memory}embeddings.{place}.weight"]
            assert same(f"{memory}tables.weights.k{k}", table)
        both = [theirs[f"{their_memory}{name}_proj.weight"] for name in ("key", "value")]
        assert torch.equal(stored.read(f"{memory}projection.weight").flatten(2), torch.stack(both))
        taps = stored.read(f"{memory}output.weight")
        assert torch.equal(taps.t(), theirs[f"{their_memory}short_conv.conv.weight"][:, 0])
