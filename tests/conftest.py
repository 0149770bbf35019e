"""What several test files need."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """--all: everything. Without it, what a change usually breaks."""
    parser.addoption("--all", action="store_true", help="run the tests marked thorough, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Thorough tests are left out unless they are asked for. Files with slow tests come first, so
    that none is left for one worker at the end."""
    if not config.getoption("--all"):
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are not part of a test's name: gzip's hold the time, and every worker must find the
    same names."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="module")
def one_process():
    """megatron-core's groups for this process alone; the layout of such a run."""
    from gengram_megatron.config.layout import Layout
    from gengram_megatron.engine.processes import end_processes, start_processes

    layout = Layout(
        world_size=1,
        tensor=1,
        pipeline=1,
        virtual_pipeline=None,
        context=1,
        expert=1,
        expert_tensor=1,
        sequence=False,
        data=1,
        expert_data=1,
        num_microbatches=1,
        steps=1,
        samples=1,
    )
    start_processes(layout, seed=1, rank=0)
    yield layout
    end_processes()


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """The runs of the tests of faults, and the unbroken one that they are compared with."""
    from tests.training.faults import Lab
    from tests.training.tiny import build_data, write_config

    folder = tmp_path_factory.mktemp("faults")
    data = build_data(tmp_path_factory.getbasetemp() / "dna_64")
    this = Lab(folder, write_config(folder / "tiny.yaml", data))
    ended = this.start("whole").wait()
    assert [said.code for said in ended] == [0, 0], ended[0].err
    return this
