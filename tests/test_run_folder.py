"""The record of what trained: config.yaml, and what it was for the steps before."""

from pathlib import Path

import pytest

from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.runs.folder import changed_keys, remove_if_unused, write_config
from tests.training.tiny import write_config as write_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a run that has done nothing yet."""
    run = tmp_path / "run"
    run.mkdir()
    return run


def config(folder: Path, rate: float, **others) -> Config:
    file = write_tiny(folder.with_name("tiny.yaml"), folder.with_name("data"))
    words = [f"{key.replace('__', '.')}={value}" for key, value in others.items()]
    return load_config(file, [f"run.dir={folder}", f"optimizer.lr={rate}", *words], Config)


def rates(folder: Path) -> dict[str, float]:
    """The learning rate in each config of a run's folder."""
    files = folder.glob("*.yaml")
    return {path.name: load_config(path, [], Config).optimizer.lr for path in files}


def test_each_part_of_a_run_has_its_config(folder: Path) -> None:
    first, second, third = (config(folder, rate) for rate in (0.01, 0.02, 0.03))
    write_config(folder, first, 0, None)
    write_config(folder, first, 4, first.model_dump())
    assert rates(folder) == {"config.yaml": 0.01}
    write_config(folder, second, 8, first.model_dump())
    write_config(folder, third, 12, second.model_dump())
    expected = {"config.until-step-8.yaml": 0.01, "config.until-step-12.yaml": 0.02}
    assert rates(folder) == {**expected, "config.yaml": 0.03}


def test_steps_that_were_undone_do_not_pass_for_the_run(folder: Path) -> None:
    """A job trained with 0.02 from step 8 on, and was killed before its first checkpoint."""
    first, second, third = (config(folder, rate) for rate in (0.01, 0.02, 0.03))
    write_config(folder, first, 0, None)
    write_config(folder, second, 8, first.model_dump())
    write_config(folder, third, 8, first.model_dump())
    kept = {"config.until-step-8.yaml": 0.01, "config.yaml": 0.03}
    assert rates(folder) == {**kept, "config.discarded-1.yaml": 0.02}


def test_config_of_a_damaged_checkpoint_is_no_longer_part_of_the_run(folder: Path) -> None:
    first, second, third = (config(folder, rate) for rate in (0.01, 0.02, 0.03))
    write_config(folder, first, 0, None)
    write_config(folder, second, 4, first.model_dump())
    write_config(folder, third, 8, second.model_dump())
    write_config(folder, third, 4, first.model_dump())  # the checkpoint of step 8 was damaged
    kept = {"config.until-step-4.yaml": 0.01, "config.yaml": 0.03}
    assert rates(folder) == {**kept, "config.until-step-8.discarded.yaml": 0.02}


def test_config_that_cannot_be_read_is_set_aside(folder: Path) -> None:
    first = config(folder, 0.01)
    (folder / "config.yaml").write_text("run: [")
    write_config(folder, first, 4, first.model_dump())
    assert (folder / "config.discarded-1.yaml").read_text() == "run: ["
    assert load_config(folder / "config.yaml", [], Config) == first


def test_changed_keys_are_told_one_a_line(folder: Path) -> None:
    earlier = config(folder, 0.01).model_dump()
    parts = [{"path": "a", "weight": 1}]
    later = config(
        folder, 0.02, model__gengram__layers="[1,3]", data__path="null", data__blend=parts
    )
    del earlier["checkpoint"]["keep"]  # of a version that did not know it
    lines = changed_keys(earlier, later.model_dump())
    assert lines[0] == "model.gengram.layers [2, 3] -> [1, 3]"
    assert lines[-1] == "optimizer.lr 0.01 -> 0.02"
    blend = next(line for line in lines if line.startswith("data.blend null -> "))
    assert "\n" not in blend and len(lines) == 4


def test_only_an_unused_folder_is_removed(folder: Path) -> None:
    (folder / ".lock").touch()
    (folder / "metrics.jsonl").touch()
    remove_if_unused(folder)
    assert folder.exists()
    (folder / "metrics.jsonl").unlink()
    remove_if_unused(folder)
    assert not folder.exists()
    remove_if_unused(folder)
