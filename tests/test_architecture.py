"""Which module may import which: the layers of ARCHITECTURE.md, read off the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.training.tiny import environment

ROOT = Path(__file__).parent.parent
LIGHT = (
    "errors", "files", "signals", "show", "tokenizer", "gpus",
    "config", "data_set", "plan", "runs", "launch", "sweep",
)  # fmt: skip
ENGINE = (
    "engine.platform", "engine.processes", "engine.data", "engine.model", "engine.checkpoint",
    "engine.training", "engine.exchange", "engine",
)  # fmt: skip
ORDER = (*LIGHT, *ENGINE, "commands", "__main__")
"""Each part of gengram_megatron imports only itself and what stands before it."""
COMPUTES = {"torch", "megatron", "deepspeed", "transformers", "transformer_engine", "safetensors"}
"""Packages that no light module may import, or all commands would take seconds to start."""
LATE = {
    ("launch.job", "torch"): "counts GPUs, for one process each",
    ("launch.local", "torch"): "is torchrun",
    ("runs.metrics", "torch"): "writes TensorBoard's files, on the first rank of a run",
    ("engine.training.run", "runs.plot"): "matplotlib takes a second, on the first rank alone",
}
"""What is imported inside of a function although it computes or is ours, and why."""


def modules() -> dict[str, Path]:
    """The name of each module of both packages and its file."""
    packages = ("gengram_megatron", "data_prep")
    files = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    return {name.removesuffix(".__init__"): path for name, path in zip(names, files)}


MODULES = modules()
HUB_CODE = "gengram_megatron.engine.exchange.hub_code"
"""Runs in processes that have nothing of this package."""


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports, and whether inside of a function or for types alone."""

    def walk(node: ast.AST, late: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((name.name, late) for name in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, f"{path}:{child.lineno}: write the module's full name"
                inner = [f"{child.module}.{name.name}" for name in child.names]
                yield from ((name if name in MODULES else child.module, late) for name in inner)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
                yield from walk(child, late or inside or types)

    yield from walk(ast.parse(path.read_text()), False)


def part(module: str) -> str | None:
    """The entry of ORDER that a module of gengram_megatron belongs to; None: the package itself."""
    name = module.removeprefix("gengram_megatron").removeprefix(".")
    return next((p for p in ORDER if name == p or name.startswith(p + ".")), None)


def ours(module: str) -> bool:
    return module.split(".")[0] == "gengram_megatron"


@pytest.mark.parametrize(
    "module",
    [m for m in MODULES if ours(m) and m != "gengram_megatron" and not m.startswith(HUB_CODE)],
)
def test_modules_import_downwards(module) -> None:
    own = part(module)
    assert own is not None, f"{module} is a new part: say in ORDER what it may import"
    for imported, _ in imports(MODULES[module]):
        assert not imported.startswith("data_prep"), f"{module} imports {imported}"
        if ours(imported) and (other := part(imported)) is not None:
            above = ORDER.index(other) <= ORDER.index(own)
            assert above, f"{module} imports {imported}, but {own} stands before {other} in ORDER"


@pytest.mark.parametrize("module", [m for m in MODULES if not ours(m)])
def test_data_preparation_imports_what_is_light(module) -> None:
    for imported, _ in imports(MODULES[module]):
        light = not ours(imported) or part(imported) in (*LIGHT, None)
        light &= imported.split(".")[0] not in COMPUTES
        assert light, f"{module} imports {imported}, which is not light"


def test_light_modules_do_not_compute() -> None:
    for module, path in MODULES.items():
        if not ours(module) or part(module) not in LIGHT:
            continue
        for imported, late in imports(path):
            package = imported.split(".")[0]
            if package in COMPUTES:
                known = (module.removeprefix("gengram_megatron."), package) in LATE
                assert late and known, f"{module} imports {package}, but is light (see COMPUTES)"


def test_nothing_in_the_engine_is_imported_late() -> None:
    """Else the order of imports could decide which functions are used."""
    for module, path in MODULES.items():
        if part(module) not in ENGINE or module.startswith(HUB_CODE):
            continue
        for imported, late in imports(path):
            if late and (ours(imported) or imported.split(".")[0] in ("torch", "megatron")):
                pair = [name.removeprefix("gengram_megatron.") for name in (module, imported)]
                assert tuple(pair) in LATE, f"{module} imports {imported} late (see LATE)"


def test_commands_enter_the_engine_late() -> None:
    """So that help and mistakes in a config are there in a fraction of a second."""
    own_processes = ("commands.doctor.built", "commands.doctor.machine")
    for module, path in MODULES.items():
        if part(module) != "commands" or module.endswith(own_processes):
            continue
        for imported, late in imports(path):
            heavy = part(imported) in ENGINE if ours(imported) else imported in COMPUTES
            assert late or not heavy, f"{module} imports {imported} at its top"


def test_each_exception_is_there() -> None:
    for (module, imported), _ in LATE.items():
        found = {name for name, late in imports(MODULES[f"gengram_megatron.{module}"]) if late}
        assert any(f".{name}.".find(f".{imported}.") >= 0 for name in found), (module, imported)


def test_no_modules_import_each_other() -> None:
    """So any of them can be imported first."""
    graph = {
        module: {name for name, late in imports(path) if not late and name in MODULES}
        for module, path in MODULES.items()
        if not module.startswith(HUB_CODE)
    }
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError


ALONE = """
import importlib, os, sys
import torch  # takes seconds, and is the same for all
for module in sys.argv[1:]:
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"{module} cannot be imported alone, or changes what others get")
        continue
    importlib.import_module(module)
    from megatron.core.fusions.fused_bias_swiglu import swiglu
    compiled = hasattr(swiglu, "_torchdynamo_orig_callable")
    os._exit(compiled != torch.cuda.is_available())
"""


def test_a_module_of_each_part_of_the_engine_can_be_imported_first() -> None:
    """In a process that has imported nothing of this project, with the same functions of
    megatron-core in each: compiled only where there is a GPU."""
    found = {part(module): module for module in MODULES if part(module) in ENGINE}
    run = [sys.executable, "-c", ALONE, *found.values(), "gengram_megatron.engine.training.step"]
    done = subprocess.run(run, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
