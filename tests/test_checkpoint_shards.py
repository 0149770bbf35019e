"""Each rank writes what it has, and all of them what megatron-core gathers and then writes."""

import math
import pickle
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import nn

from gengram_megatron.engine.checkpoint.contents import blocks, weight_shards
from gengram_megatron.engine.checkpoint.stored import StoredTensors
from tests.layouts.launch import launch
from tests.resharding.both_ways import CASES, processes, write
from tests.selection import quick_or_thorough, selected
from tests.training.tiny import build_data, write_config

# All cases run in the fixture, which counts as part of the first test.
pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("shape", [(7,), (3, 4), (1, 5), (2, 3, 4), (1, 1, 3, 2), (2, 1, 2, 3)])
def test_blocks_are_the_range_in_its_order(shape: tuple[int, ...]) -> None:
    places = torch.arange(math.prod(shape)).view(shape)
    for low, high in product(range(math.prod(shape) + 1), repeat=2):
        found = list(blocks(shape, low, high))
        cut = [places[tuple(slice(o, o + n) for o, n in zip(*block))] for block in found]
        assert all(part.shape == size for part, (_, size) in zip(cut, found))
        assert [int(i) for part in cut for i in part.flatten()] == list(range(low, high))
        assert len(found) <= 2 * len(shape) - 1


class Turned(nn.Module):
    """Its weight [2, 3] is the tensor [3, 2]."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))

    def sharded_state_dict(self, metadata: dict) -> dict:
        return {"weight": ShardedTensor.from_rank_offsets("weight", self.weight.mT)}


def test_weight_whose_elements_lie_in_another_order_is_refused() -> None:
    with pytest.raises(AssertionError, match="weight: its elements are not one range"):
        weight_shards([Turned()])


NAMES = quick_or_thorough(CASES, ("dp2", "dp2_hashed_rows", "dp2_tp2_ep2", "plain"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    data = build_data(tmp_path_factory.getbasetemp() / "dna_64")
    config = write_config(folder / "tiny.yaml", data)
    for name in sorted(selected(request, "name")):
        launch(processes(name), write, name, config, folder)
    return folder


def own(folder: Path, name: str) -> Path:
    """The third: what was planned for the first two is used again."""
    return folder / name / "checkpoints/step_00000003"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_what_gathering_writes(folder: Path, name: str) -> None:
    found, expected = StoredTensors(own(folder, name)), StoredTensors(folder / name / "gathered")
    assert sorted(found.names) == sorted(expected.names)
    for key in expected.names:
        assert found.shape(key) == expected.shape(key) and found.dtype(key) == expected.dtype(key)
        assert torch.equal(found.read(key), expected.read(key)), key


@pytest.mark.parametrize("name", NAMES)
def test_every_element_is_written_once(folder: Path, name: str) -> None:
    described = pickle.loads((own(folder, name) / ".metadata").read_bytes()).state_dict_metadata
    for key, tensor in described.items():
        if hasattr(tensor, "chunks"):
            times = torch.zeros(tensor.size, dtype=torch.int)
            for chunk in tensor.chunks:
                sizes = [*[1] * (times.dim() - len(chunk.sizes)), *chunk.sizes]
                times[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, sizes))] += 1
            assert (times == 1).all(), key


@pytest.mark.parametrize("name", quick_or_thorough(("dp2", "dp4"), ("dp2",)))
def test_ranks_write_equal_shares(folder: Path, name: str) -> None:
    written = Counter()
    described = pickle.loads((own(folder, name) / ".metadata").read_bytes())
    for index, place in described.storage_data.items():
        tensor = described.state_dict_metadata[index.fqn]
        if hasattr(tensor, "chunks"):
            size = next(c.sizes for c in tensor.chunks if c.offsets == index.offset)
            rank = place.relative_path.removeprefix("__").split("_")[0]
            written[rank] += size.numel() * tensor.properties.dtype.itemsize
    assert len(written) == processes(name)
    assert max(written.values()) < 1.2 * min(written.values())
