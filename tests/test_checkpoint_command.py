"""gengram checkpoint inspect, strip, export and import, as commands."""

import io
import json
import math
import pickle
import resource
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gengram_megatron.commands.cli import main
from gengram_megatron.engine.checkpoint.stored import StoredTensors
from gengram_megatron.engine.checkpoint.weights_only import Source, write
from gengram_megatron.errors import UserError
from gengram_megatron.runs.store import CHECKSUMS, CheckpointStore, read_facts, write_checksums
from tests.exchange_models import Trained, build, load, make, named


@pytest.fixture(scope="module")
def trained(one_process, tmp_path_factory) -> Trained:
    return make("moe_memory", tmp_path_factory.mktemp("trained"))


@pytest.fixture
def gengram(monkeypatch, capsys):
    """Run a command in this process; returns its exit code, output and errors."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gengram", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        out = capsys.readouterr()
        return end.value.code or 0, out.out, out.err

    return run


def counted(weights: dict[str, torch.Tensor], *parts: str) -> int:
    return sum(w.numel() for name, w in weights.items() if any(part in name for part in parts))


def test_inspect_says_what_is_there(trained, gengram) -> None:
    code, out, err = gengram("checkpoint", "inspect", trained.run, "--json")
    found, weights = json.loads(out), trained.weights
    assert (code, err) == (0, "")
    assert (found["step"], found["samples"], found["tokens"]) == (3, 24, 24 * 64)
    assert found["layout"]["world_size"] == 1 and found["has_optimizer"]
    parameters = found["parameters"]
    assert parameters["total"] == sum(w.numel() for w in weights.values())
    assert parameters["total"] == sum(parameters.values()) - parameters["total"]
    assert parameters["experts"] == counted(weights, ".experts.")
    assert parameters["attention"] == counted(weights, ".self_attention.")
    assert parameters["gengram tables"] == counted(weights, ".tables.")
    assert parameters["gengram"] == counted(weights, ".memory.") - counted(weights, ".tables.")
    assert [(t["layer"], t["name"], t["rows"], t["columns"]) for t in found["tables"]] == [
        (layer, f"k{k}", 5**k, 8) for layer in (2, 3) for k in range(1, 7)
    ]
    assert found["bytes"]["weights"] == 4 * parameters["total"]
    assert found["bytes"]["optimizer"] == 3 * found["bytes"]["weights"]
    assert found["bytes"]["files"] > found["bytes"]["weights"] + found["bytes"]["optimizer"]
    assert found["config"] == trained.config.model_dump()


def test_inspect_shows_people_the_same(trained, gengram) -> None:
    code, out, _ = gengram("checkpoint", "inspect", trained.run / "checkpoints" / "step_00000003")
    assert code == 0
    total = sum(w.numel() for w in trained.weights.values())
    assert "yes" in next(line for line in out.splitlines() if "can be resumed" in line)
    for words in (f"{total:,}", "1,536", "15,625", "2, 3", "float32"):
        assert words in out


def test_inspect_opens_no_tensor(trained, tmp_path, gengram) -> None:
    """Without the files that tensors lie in, all but their own size is the same."""
    copy = tmp_path / "copy"
    copy.mkdir()
    checkpoint = trained.run / "checkpoints" / "step_00000003"
    for file in checkpoint.iterdir():
        if file.suffix != ".distcp":
            (copy / file.name).write_bytes(file.read_bytes())
    found, whole = (
        json.loads(gengram("checkpoint", "inspect", path, "--json")[1])
        for path in (copy, checkpoint)
    )
    tensors = [file.name for file in checkpoint.iterdir() if file.suffix == ".distcp"]
    assert found["missing_files"] == sorted(f"{name} is missing" for name in tensors)
    assert whole["missing_files"] == []
    for summary in (found, whole):
        del summary["path"], summary["bytes"]["files"], summary["missing_files"]
    assert found == whole
    _, shown, _ = gengram("checkpoint", "inspect", copy)
    (line,) = (line for line in shown.splitlines() if "can be resumed" in line)
    assert "yes" not in line and "no, " in line


def test_strip_leaves_the_weights(trained, tmp_path, gengram) -> None:
    code, out, _ = gengram("checkpoint", "strip", trained.run, tmp_path / "light")
    light = tmp_path / "light" / "step_00000003"
    assert code == 0 and out.strip() == str(light)
    stored = StoredTensors(light)
    assert set(stored.names) == set(trained.weights)
    assert all(torch.equal(stored.read(name), w) for name, w in trained.weights.items())
    original = trained.run / "checkpoints" / "step_00000003"
    assert read_facts(light) == read_facts(original)
    size, before = (sum(f.stat().st_size for f in p.iterdir()) for p in (light, original))
    assert size < 0.27 * before
    found = json.loads(gengram("checkpoint", "inspect", light, "--json")[1])
    assert not found["has_optimizer"] and found["bytes"]["optimizer"] == 0
    code, _, err = gengram("checkpoint", "strip", trained.run, tmp_path / "light")
    assert code == 2 and "give another folder" in err


@pytest.mark.parametrize("command", ["strip", "export"])
def test_nothing_is_made_of_a_damaged_checkpoint(trained, tmp_path, gengram, command) -> None:
    copy = tmp_path / "step_00000003"
    shutil.copytree(trained.run / "checkpoints" / "step_00000003", copy)
    file = max(copy.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    code, _, err = gengram("checkpoint", command, copy, tmp_path / "out")
    assert code == 2 and file.name in err and "damaged" in err
    assert not (tmp_path / "out").exists()


def test_description_of_tensors_names_no_modules() -> None:
    """What the modules of these classes import must not be had through them."""
    from gengram_megatron.engine.checkpoint.stored import _MetadataUnpickler

    for name in ("os", "torch", "Any"):
        pickled = f"ctorch.distributed.checkpoint.metadata\n{name}\n.".encode()
        with pytest.raises(pickle.UnpicklingError, match="only descriptions of tensors"):
            _MetadataUnpickler(io.BytesIO(pickled)).load()
    known = b"ctorch.distributed.checkpoint.metadata\nBytesStorageMetadata\n."
    assert _MetadataUnpickler(io.BytesIO(known)).load().__name__ == "BytesStorageMetadata"


def test_run_cannot_go_on_without_its_optimizer(trained, tmp_path, gengram, one_process) -> None:
    from gengram_megatron.engine.checkpoint.state import TrainingState

    config = load(tmp_path, "run")
    gengram("checkpoint", "strip", trained.run, tmp_path / "run" / "checkpoints")
    state = TrainingState(config, one_process, *build(config, one_process), [])
    with pytest.raises(UserError, match="holds weights only, without the optimizer that step 4"):
        state.load_newest()


def without_schedule(checkpoint: Path) -> None:
    """Its checksums are those of what is there; only loading finds that something is not."""
    common = torch.load(checkpoint / "common.pt", weights_only=False)
    del common["schedule"]
    torch.save(common, checkpoint / "common.pt")
    (checkpoint / CHECKSUMS).unlink()
    write_checksums(checkpoint, {})


def test_weights_alone_are_not_taken_after_half_a_load(trained, tmp_path, one_process) -> None:
    """What was loaded of the optimizer would stay, as weights alone do not overwrite it."""
    from gengram_megatron.engine.checkpoint.state import ResumePoint, TrainingState

    folder = tmp_path / "run" / "checkpoints"
    newest = folder / "step_00000003"
    shutil.copytree(trained.run / "checkpoints" / newest.name, newest)
    stored, facts = StoredTensors(newest), read_facts(newest)
    names = list(trained.weights)
    source = Source(
        {name: stored.shape(name) for name in names},
        {name: stored.dtype(name) for name in names},
        stored.read,
    )
    common = {"config": trained.config.model_dump(), "step": 0}
    write(CheckpointStore(folder), source, common, replace(facts, step=0, samples=0))
    without_schedule(newest)
    config = load(tmp_path, "run")
    with pytest.raises(UserError) as error:
        TrainingState(config, one_process, *build(config, one_process), []).load_newest()
    assert "step_00000000" in str(error.value) and "weights only" in str(error.value)
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000000", newest.name]
    newest.rename(tmp_path / newest.name)
    state = TrainingState(config, one_process, *build(config, one_process), [])
    assert state.load_newest() == ResumePoint(0)


def test_another_runs_checkpoint_is_not_set_aside(trained, tmp_path, one_process) -> None:
    """Its newest has tensors that are none; the one before is taken, and that is told."""
    from gengram_megatron.engine.checkpoint.state import TrainingState

    folder = tmp_path / "source" / "checkpoints"
    for step in (3, 4):
        shutil.copytree(trained.run / "checkpoints/step_00000003", folder / f"step_{step:08d}")
    newest = folder / "step_00000004"
    for file in newest.glob("*.distcp"):
        file.write_bytes(bytes(file.stat().st_size))
    (newest / CHECKSUMS).unlink()
    write_checksums(newest, {})
    config = load(tmp_path, "run", f"checkpoint.load={tmp_path / 'source'}")
    chunks, *others = build(config, one_process)
    beginning = TrainingState(config, one_process, chunks, *others, []).load_newest()
    assert (beginning.step, beginning.origin) == (0, folder / "step_00000003")
    assert "checkpoint.load: " in beginning.warning
    assert "step_00000004 (cannot be loaded: " in beginning.warning
    weights = named(chunks[0])
    assert all(torch.equal(weights[name], w) for name, w in trained.weights.items())
    shutil.rmtree(folder / "step_00000003")
    with pytest.raises(UserError, match=r"checkpoint.load: .*step_00000004"):
        TrainingState(config, one_process, *build(config, one_process), []).load_newest()
    assert [path.name for path in folder.iterdir()] == [newest.name]


@pytest.mark.filterwarnings("error::UserWarning")
def test_export_and_import_there_and_back(trained, tmp_path, gengram) -> None:
    out, config = tmp_path / "out", tmp_path / "tiny.yaml"
    code, _, err = gengram("checkpoint", "export", trained.run, out, "--largest-file", "0.0005")
    assert (code, err) == (0, "")
    files = list(out.glob("*.safetensors"))
    whole = 4 * sum(w.numel() for w in trained.weights.values())
    assert len(files) >= math.ceil(whole / 500_000)
    load(tmp_path, "run")  # writes the config
    code, said, err = gengram("checkpoint", "import", out, config, f"run.dir={tmp_path / 'back'}")
    assert code == 0, err
    checkpoint = tmp_path / "back" / "checkpoints" / "step_00000000"
    assert said.strip() == str(checkpoint)
    stored = StoredTensors(checkpoint)
    assert all(torch.equal(stored.read(name), w) for name, w in trained.weights.items())
    again = gengram("checkpoint", "import", out, config, f"run.dir={tmp_path / 'back'}")
    assert again[0] == 2 and "checkpoints; give another run.dir" in again[2]


@pytest.mark.parametrize(
    "change", [lambda data: data[:100], lambda data: bytes(len(data))], ids=["cut", "overwritten"]
)
def test_damaged_tensors_are_a_sentence(trained, tmp_path, gengram, change) -> None:
    checkpoint = tmp_path / "step_00000003"
    shutil.copytree(trained.run / "checkpoints" / checkpoint.name, checkpoint)
    for file in checkpoint.glob("*.distcp"):
        file.write_bytes(change(file.read_bytes()))
    write_checksums(checkpoint, {})  # as if it had been written so
    code, _, err = gengram("checkpoint", "export", checkpoint, tmp_path / "out")
    assert code == 2 and " cannot be read: its file is damaged" in err
    assert len(err.splitlines()) == 1, err


@pytest.mark.parametrize("command", [["inspect"], ["strip", "light"], ["export", "out"]])
def test_folder_without_checkpoints_is_a_sentence(tmp_path, gengram, command) -> None:
    name, *out = command
    words = ["checkpoint", name, tmp_path, *(tmp_path / folder for folder in out)]
    code, _, err = gengram(*words)
    assert code == 2 and "is neither a checkpoint of gengram" in err
    assert len(err.splitlines()) == 1


@pytest.fixture
def source(trained, tmp_path, gengram) -> dict[str, list]:
    """The first words of each command that writes, up to where it writes to."""
    load(tmp_path, "run")  # writes the config
    gengram("checkpoint", "export", trained.run, tmp_path / "exported")
    return {
        "export": ["export", trained.run],
        "strip": ["strip", trained.run],
        "import": ["import", tmp_path / "exported", tmp_path / "tiny.yaml"],
    }


WRITERS = ("export", "strip", "import")


def target(command: str, out: Path) -> str | Path:
    return f"run.dir={out}" if command == "import" else out


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize("parent", ["file", "/proc"])
def test_folder_that_cannot_be_made_is_a_sentence(
    source, tmp_path, gengram, command, parent
) -> None:
    """Told first: what is to be read is not there either."""
    (tmp_path / "file").touch()
    out = tmp_path / parent / "out"
    first, _, *rest = source[command]
    words = [first, tmp_path / "nothing", *rest, target(command, out)]
    code, _, err = gengram("checkpoint", *words)
    assert code == 2 and len(err.splitlines()) == 1, err
    assert str(out.parent) in err and "cannot be written" in err and "give another folder" in err


@pytest.mark.parametrize("command", WRITERS)
def test_full_disk_is_a_sentence_and_leaves_nothing(source, tmp_path, gengram, command) -> None:
    out = tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        code, _, err = gengram("checkpoint", *source[command], target(command, out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2 and len(err.splitlines()) == 1, err
    assert str(out) in err and "cannot be written" in err and "File too large" in err
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".partial")]


def unreadable(file: Path) -> None:
    """Opening it is allowed, and reading it is an error, for root as well."""
    file.unlink(missing_ok=True)
    file.symlink_to("/proc/self/mem")


@pytest.mark.parametrize("command", ["export", "strip"])
def test_file_of_a_checkpoint_that_cannot_be_read_is_a_sentence(
    trained, tmp_path, gengram, command
) -> None:
    checkpoint = tmp_path / "step_00000003"
    shutil.copytree(trained.run / "checkpoints" / checkpoint.name, checkpoint)
    last = max(checkpoint.glob("*.distcp"))
    unreadable(last)
    code, _, err = gengram("checkpoint", command, checkpoint, tmp_path / "out")
    assert code == 2 and len(err.splitlines()) == 1, err
    assert f"{last} cannot be read: Input/output error" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("config.json", unreadable),
        ("model.safetensors", unreadable),
        ("model.safetensors", lambda file: file.write_bytes(file.read_bytes()[:1000])),
        ("model.safetensors", lambda file: file.write_bytes(b"{}")),
    ],
)
def test_file_of_a_model_that_cannot_be_read_is_a_sentence(
    source, tmp_path, gengram, name, spoil
) -> None:
    file = tmp_path / "exported" / name
    spoil(file)
    code, _, err = gengram("checkpoint", *source["import"], f"run.dir={tmp_path / 'back'}")
    assert code == 2 and len(err.splitlines()) == 1, err
    assert f"{file} cannot be read" in err


def test_megatron_folder_that_cannot_be_read_is_a_sentence(tmp_path, gengram) -> None:
    load(tmp_path, "run")  # writes the config
    newest = tmp_path / "megatron" / "latest_checkpointed_iteration.txt"
    newest.parent.mkdir()
    unreadable(newest)
    words = ["import", newest.parent, tmp_path / "tiny.yaml", f"run.dir={tmp_path / 'back'}"]
    code, _, err = gengram("checkpoint", *words)
    assert code == 2 and len(err.splitlines()) == 1, err
    assert f"{newest} cannot be read" in err
