"""Models built for Transformer Engine and apex, against stand-ins of both.

Neither runs without a GPU, so nothing of the real libraries is tested here. The stand-in of
Transformer Engine (tests/stand_ins/engine) has the signatures of its public documentation and
computes the plain formulas: what these tests show is that megatron-core and this package call it
with arguments that exist, and that initial weights, names in checkpoints, gradients that modules
add up themselves, recomputation and fp8's demands on sizes fit together. That of apex
(tests/stand_ins/apex) has the one function that megatron-core calls. Each is on the path of a
process of its own.
"""

import ast
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.exchange_models import load
from tests.layouts.launch import ROOT
from tests.observed import KINDS, LAYOUTS, RECOMPUTED, SOME, configs, go_on, observe, same_model
from tests.training.tiny import environment

STAND_INS = ROOT / "tests" / "stand_ins"
VARIANTS = ("", ", recomputed", ", fp8")


def start(stand_in: str, what: str, folder: Path, **variables: str) -> subprocess.Popen:
    """A process that has a stand-in on its path."""
    path = f"{STAND_INS / stand_in}{os.pathsep}{ROOT}"
    return subprocess.Popen(
        [sys.executable, "-m", "tests.observed_worker", what, folder],
        cwd=ROOT,
        env={**environment(), "PYTHONPATH": path, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen, folder: Path) -> dict:
    """What it found."""
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return torch.load(folder / "observed.pt")


def signatures(folder: Path) -> dict[str, list[set[str]]]:
    """Function, or class and method -> the names of its arguments, for each that is called so."""
    found: dict[str, list[set[str]]] = {}
    for file in folder.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            inside = node.body if isinstance(node, ast.ClassDef) else [node]
            prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
            for function in inside:
                if isinstance(function, ast.FunctionDef):
                    names = {a.arg for a in (*function.args.args, *function.args.kwonlyargs)}
                    rest = {"**"} if function.args.kwarg else set()
                    found.setdefault(prefix + function.name, []).append(names | rest)
    return found


@pytest.mark.skipif(find_spec("transformer_engine") is None, reason="needs Transformer Engine")
def test_the_stand_in_knows_no_argument_that_the_library_lacks():
    """Where the library lies, its source is read; it need not be importable."""
    [folder] = find_spec("transformer_engine").submodule_search_locations
    library = signatures(Path(folder) / "pytorch")
    ours = signatures(STAND_INS / "engine" / "transformer_engine" / "pytorch")
    modules = (
        "Linear LayerNormLinear GroupedLinear RMSNorm DotProductAttention Fp8Padding Fp8Unpadding"
    )
    names = [f"{module}.__init__" for module in modules.split()]
    names += [f"{module}.forward" for module in modules.split() if module != "RMSNorm"]
    for name in (*names, "fp8_autocast", "fp8_model_init", "checkpoint"):
        [arguments] = ours[name]
        assert any(arguments <= real or "**" in real for real in library[name]), name


@pytest.fixture(scope="module")
def of_torch(one_process, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("torch")
    return {name: observe(config) for name, config in configs(folder, "torch")}


@pytest.fixture(scope="module")
def folder(one_process, tmp_path_factory) -> Path:
    """Of the runs that torch begins and goes on with."""
    folder = tmp_path_factory.mktemp("engine")
    for kind in SOME:
        go_on(load(folder, f"{kind}_of_torch", *KINDS[kind]), steps=2)
    return folder


@pytest.fixture(scope="module")
def of_engine(folder) -> dict:
    return ended(start("engine", "transformer_engine", folder), folder)


@pytest.fixture(scope="module")
def of_apex(one_process, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("apex")
    return ended(start("apex", "apex", folder), folder)


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory) -> list[dict]:
    """What each has of the models that they build together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    folders = [tmp_path_factory.mktemp(f"rank_{rank}") for rank in range(2)]
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    processes = [
        start("engine", "layouts", folder, RANK=str(rank), LOCAL_RANK=str(rank), **meet)
        for rank, folder in enumerate(folders)
    ]
    return [ended(process, folder) for process, folder in zip(processes, folders)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_s_model_is_that_of_torch(of_engine, of_torch, kind, variant):
    """Its layers add up gradients in the product, which leaves room full of NaN behind."""
    tolerance = 0.1 if variant == ", fp8" else 1e-4  # in bf16 other kernels round otherwise
    same_model(of_engine[kind + variant], of_torch[kind + variant], tolerance)


@pytest.mark.parametrize("variant", ["", ", fp8"], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", SOME)
def test_apex_s_gradients_are_those_of_torch(of_apex, of_torch, kind, variant):
    tolerance = 0.02 if variant else 1e-4  # summed up in float32, each here and rounded there
    same_model(of_apex[kind + variant], of_torch[kind + variant], tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_which_parts_are_reported(of_engine, of_apex, of_torch, kind):
    dense = kind.endswith("dense")
    parts = of_engine[f"{kind}, fp8"]["parts"]
    engine = "Transformer Engine"
    assert parts["attention"] == f"{engine} (DotProductAttention)"
    assert parts["norm"] == f"{engine} (LayerNormLinear)"
    assert parts["linear"] == f"{engine} (Linear)"
    assert parts["experts"] == (None if dense else f"{engine} (GroupedLinear)")
    assert parts["memory"].startswith("Gengram, ")
    assert parts["gradient accumulation fusion"] == engine
    assert parts["fp8"] == "tensorwise, hybrid"
    assert of_engine[kind]["parts"]["fp8"] == "off"
    plain = of_torch[kind]["parts"]
    assert plain["gradient accumulation fusion"] == "off"
    assert plain["norm"] == "torch rms_norm" and plain["linear"] == "torch matmul"
    if kind in SOME:
        assert of_apex[kind]["parts"] == {**plain, "gradient accumulation fusion": "apex"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_product_of_attention_and_feed_forward_is_in_fp8(of_engine, kind):
    """In each pass over each of four microbatches; embedding, router, memory and logits are not
    modules of Transformer Engine and stay in bf16."""
    counted = of_engine[f"{kind}, fp8"]["passes_in_fp8"]
    assert len(counted) >= 4 * (4 if kind.endswith("dense") else 5)
    whole = RECOMPUTED[kind] == "full"
    for name, passes in counted.items():
        again = whole or (kind == "mha_dense" and ".mlp." in name)  # selective: the feed-forward
        assert passes == 4 * (1 + again), name
    assert not any(of_engine[kind]["passes_in_fp8"].values())


def test_torch_s_layers_beside_an_installed_engine(of_engine, of_torch):
    """megatron-core then recomputes activations, and routes, with the library's help."""
    same_model(of_engine["torch"], of_torch["gqa_moe, recomputed"], 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_hold_the_weights_of_one(of_two_ranks, of_torch, layout):
    """The parts that they have, by the names and at the places that their checkpoints give."""
    kind, *_ = LAYOUTS[layout]
    whole, covered = of_torch[kind]["weights"], {}
    for name, (first, shape), weight in (piece for rank in of_two_ranks for piece in rank[layout]):
        place = tuple(slice(start, start + size) for start, size in zip(first, weight.shape))
        assert tuple(whole[name].shape) == shape
        assert torch.equal(whole[name][place].to(weight.dtype), weight), name
        covered.setdefault(name, torch.zeros(shape, dtype=torch.bool))[place] = True
    assert covered.keys() == whole.keys()
    assert all(here.all() for here in covered.values())


def test_room_for_a_gradient_is_not_taken_for_one(of_engine):
    """When the cause of a NaN is looked for."""
    assert of_engine["diagnosis"].startswith("a second pass over the same batch was finite")


def test_a_run_in_fp8_goes_on_bit_for_bit(of_engine):
    """Though what modules note of fp8 is left out when a checkpoint is loaded."""
    assert of_engine["fp8"] == of_engine["fp8, cut"]


@pytest.mark.parametrize("kind", SOME)
def test_a_run_goes_on_with_the_other_implementation(of_engine, one_process, folder, kind):
    """Weights and Adam's states, in both directions."""
    whole = go_on(load(folder, f"{kind}_whole", *KINDS[kind]), steps=4, save=False)
    assert whole[0] != pytest.approx(whole[3], rel=1e-3)
    assert of_engine[f"{kind}_of_torch"] == pytest.approx(whole[2:], rel=1e-5)
    assert of_engine[f"{kind}_of_engine"] == pytest.approx(whole[:2], rel=1e-5)
    ended = go_on(load(folder, f"{kind}_of_engine", *KINDS[kind]), steps=2, save=False)
    assert ended == pytest.approx(whole[2:], rel=1e-5)
