"""What export, import and strip hold in memory, and the files that are written and read in
parts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from gengram_megatron.engine.checkpoint import stored as module
from gengram_megatron.engine.checkpoint.stored import StoredTensors
from gengram_megatron.engine.exchange.weights import SafetensorsFile
from gengram_megatron.errors import UserError
from tests.layouts.launch import ROOT
from tests.training.tiny import environment


@pytest.mark.thorough
@pytest.mark.parametrize("kind", [(), ("--plain",)])
def test_one_tensor_is_in_memory_at_a_time(tmp_path, kind) -> None:
    """Its model's largest tensor, the first map of all experts of a layer, has 34 MB."""
    out = tmp_path / "found.json"
    words = ("--hidden", "512", "--layers", "3", "--width", "2048", "--dir", tmp_path, "--out", out)
    done = subprocess.run(
        [sys.executable, "benchmarks/exchange_memory.py", *words, *kind],
        cwd=ROOT,
        # What malloc keeps for later, 50 MB or so, would hide what is held.
        env={**environment(), "MALLOC_MMAP_THRESHOLD_": "1000000"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(out.read_text())
    largest, actions = found["largest_tensor"], found["actions"]
    assert largest == 8 * 2 * 2048 * 512 * 2
    assert 2 * found["parameters"] > 4.5 * largest
    # Twice is promised; what is above once is one of eight experts and the blocks that are read.
    assert {name: row["own"] for name, row in actions.items() if row["own"] > 1.4 * largest} == {}
    del actions["import, rank files"]  # which are mapped
    assert len(actions) == 4
    assert all(row["resident"] < 2 * largest for row in actions.values()), actions


def test_file_is_what_the_package_writes(tmp_path) -> None:
    tensors = {
        "b.weight": torch.randn(3, 5).bfloat16(),
        "a.weight": torch.randn(7).bfloat16(),  # an odd number of bytes of four
        "c é": torch.randn(2, 3, 4),
        "d": torch.randn(0, 4),
        "e": torch.tensor(2.0),
    }
    file = SafetensorsFile(
        tmp_path / "model.safetensors", {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()}
    )
    for name, tensor in tensors.items():
        file.write(name, tensor)
    assert file.path.read_bytes() == save(tensors, metadata={"format": "pt"})
    with safe_open(file.path, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            assert torch.equal(opened.get_tensor(name), tensor)
    with pytest.raises(AssertionError, match="does not have the size that the header states"):
        file.write("a.weight", tensors["b.weight"])


STORED = {
    "whole": torch.randn(4, 3, 5, 7),
    "turned": torch.randn(6, 9).t(),
    "rows": torch.arange(60).view(20, 3).bfloat16(),
    "number": torch.tensor(3.0),
    "nothing": torch.randn(0, 3),
    "one": torch.randn(1, 1, 40),
    "flags": torch.arange(12).view(3, 4) % 2 == 0,
}


class Pieces:
    """A planner that says what each piece is; pieces: name, offset, tensor."""

    def __init__(self, pieces: list[tuple[str, tuple[int, ...], Tensor]]):
        self.pieces = pieces

    def resolve_data(self, item: WriteItem) -> Tensor:
        return next(
            tensor
            for name, offset, tensor in self.pieces
            if (name, offset) == (item.index.fqn, tuple(item.index.offset))
        )


def write_pieces(folder: Path, pieces: list[tuple[str, tuple[int, ...], Tensor]]) -> None:
    """As ranks store them, all in one file, so that numbers lie at any byte of it."""
    items, described = [], {}
    for name, offset, tensor in pieces:
        chunk = ChunkStorageMetadata(torch.Size(offset), tensor.shape)
        properties = TensorProperties(dtype=tensor.dtype)
        whole = STORED[name].shape
        items.append(
            WriteItem(
                MetadataIndex(name, torch.Size(offset)),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, whole),
            )
        )
        described.setdefault(name, TensorStorageMetadata(properties, whole, [])).chunks.append(
            chunk
        )
    writer = FileSystemWriter(folder)
    writer.set_up_storage_writer(is_coordinator=True)
    (plan,) = writer.prepare_global_plan([SavePlan(items)])
    written = writer.write_data(plan, Pieces(pieces))
    writer.finish(Metadata(described), [written.wait()])


@pytest.fixture(params=[8, 50, 300, module.BLOCK])
def stored(request, tmp_path, monkeypatch) -> StoredTensors:
    """Read in blocks of so many bytes: numbers, parts of rows, rows, all."""
    monkeypatch.setattr(module, "BLOCK", request.param)
    pieces = [(name, (0,) * tensor.ndim, tensor) for name, tensor in STORED.items()]
    write_pieces(tmp_path, pieces)
    return StoredTensors(tmp_path)


def test_blocks_make_the_whole(stored) -> None:
    for name, tensor in STORED.items():
        assert torch.equal(stored.read(name), tensor), name
    assert torch.equal(stored.read("whole", 2), STORED["whole"][2])
    assert torch.equal(stored.read("whole", 3, 1), STORED["whole"][3, 1])
    assert torch.equal(stored.read("turned", 4), STORED["turned"][4])


@pytest.mark.parametrize("block", [8, 50, module.BLOCK])
def test_pieces_of_several_ranks_make_the_whole(tmp_path, monkeypatch, block) -> None:
    """Cut along rows and columns, not at the same places."""
    monkeypatch.setattr(module, "BLOCK", block)
    whole = STORED["whole"]
    pieces = [
        ("whole", (0, 0, 0, 0), whole[:3, :2].contiguous()),
        ("whole", (3, 0, 0, 0), whole[3:, :2].contiguous()),
        ("whole", (0, 2, 0, 0), whole[:, 2:, :, :4].contiguous()),
        ("whole", (0, 2, 0, 4), whole[:, 2:, :, 4:].contiguous()),
    ]
    write_pieces(tmp_path, pieces)
    found = StoredTensors(tmp_path)
    assert torch.equal(found.read("whole"), whole)
    assert torch.equal(found.read("whole", 3, 2), whole[3, 2])


def test_file_that_ends_too_early_is_a_sentence(tmp_path) -> None:
    write_pieces(tmp_path, [("whole", (0, 0, 0, 0), STORED["whole"])])
    (file,) = tmp_path.glob("*.distcp")
    for size in (file.stat().st_size // 2, 10, 0):
        os.truncate(file, size)
        with pytest.raises(UserError, match="whole cannot be read: its file is damaged"):
            StoredTensors(tmp_path).read("whole")
