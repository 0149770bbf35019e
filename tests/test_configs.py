"""The configs of the paper's runs: that all are there, and that each is the run it says it is."""

import re
from pathlib import Path

import pytest

from data_prep.schema import DataConfig
from gengram_megatron.commands.plan import smallest_world
from gengram_megatron.config.layout import check_layout
from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.config.weights import count_parameters
from gengram_megatron.engine.checkpoint.restore import check_same_model
from gengram_megatron.plan import plan
from gengram_megatron.plan.time import Speed
from gengram_megatron.sweep.runs import read_sweep
from tests.plan.configs import CONFIGS, GENOS, PAPER, ROOT, RUNS, SWEEPS, load
from tests.plan.ranks import as_rank, build_shapes

WINDOWS = (6, 8, 9, 10, 12, 14, 15, 16, 18, 20, 21, 22, 24, 26, 27, 28, 30)
FORMAL = ("baseline", "gengram_no_window", "gengram_window_21")
GPUS = 256  # of the formal runs, as Genos-10B was trained


def planned(config: Config, processes: int | None = None) -> dict:
    layout = check_layout(config, processes or smallest_world(config))
    return plan(config, layout, Speed(), gigabytes=80)


def without_folder(config: Config) -> dict:
    return {**config.model_dump(), "run": None}


@pytest.mark.parametrize("name", RUNS)
def test_every_run_plans_has_its_own_folder_and_its_true_number_of_parameters(name):
    config = load(name)
    assert config.run.dir == f"runs/{name}"
    found = planned(config)
    alone = config.model_copy(update={"parallel": type(config.parallel)()})
    layout = check_layout(alone, 1)
    with as_rank(layout, 0):
        (chunk,) = build_shapes(alone, layout)
        sizes = {key: weight.numel() for key, weight in chunk.named_parameters()}
    assert found["parameters"]["total"] == sum(sizes.values())
    gengram = {key: size for key, size in sizes.items() if ".memory." in key}
    assert found["parameters"]["gengram"] == sum(gengram.values())
    tables = sum(size for key, size in gengram.items() if ".tables." in key)
    assert found["parameters"]["tables"] == tables


def test_no_two_files_are_one_run():
    seen = []
    for name in RUNS:
        run = without_folder(load(name))
        assert run not in seen, name
        seen.append(run)


@pytest.mark.parametrize(
    "name, total, activated",
    [
        ("ablation_50b_8k/baseline", 1_246_356_480, 340_386_816),
        ("ablation_50b_8k/architecture/dense_gqa", 295_599_360, 295_599_360),
        ("ablation_50b_8k/architecture/dense_mha", 315_260_160, 315_260_160),
        ("pretrain_200b_8k/baseline", 10_270_248_960, 3_022_491_648),
        ("pretrain_100b_32k/baseline", 10_270_248_960, 3_022_491_648),
        # 128 ids less than the vocabulary of 256, twice: in the embedding and in the output layer.
        ("genos/genos_1.2b", 1_246_356_480 - 2 * 128 * 1024, 340_386_816 - 2 * 128 * 1024),
        ("genos/genos_10b", 10_270_248_960, 3_022_491_648),
    ],
)
def test_models_have_the_sizes_of_the_paper(name, total, activated):
    counted = count_parameters(load(name))
    assert (counted.total, counted.activated) == (total, activated)
    assert round(counted.total / 1e9, 1) in (1.2, 0.3, 10.3)


@pytest.mark.parametrize("experts, activated", [(128, 0.156e9), (64, 0.31e9), (32, 0.63e9)])
def test_load_balancing_keeps_ten_billion(experts, activated):
    """Of what is active the paper counts the chosen experts alone."""
    config = load(f"ablation_50b_8k/load_balance/experts_{experts}")
    model, counted = config.model, count_parameters(config)
    assert model.num_experts == experts
    assert round(counted.total / 1e9) == 10
    chosen = model.num_layers * 2 * 3 * model.hidden_size * model.ffn_hidden_size
    assert chosen == pytest.approx(activated, rel=0.01)


@pytest.mark.parametrize("experts", [32, 64, 128])
def test_load_balancing_has_the_layers_of_table_14_and_no_window(experts):
    gengram = load(f"ablation_50b_8k/load_balance/experts_{experts}_gengram").model.gengram
    assert (gengram.enabled, gengram.layers, gengram.window) == (True, [3, 6, 10], None)


@pytest.mark.parametrize("name", PAPER)
def test_lengths_are_the_papers(name):
    found, config = planned(load(name)), load(name)
    samples, length, tokens = {
        "ablation_50b_8k": (6_103_515, 8192, 50e9),
        "pretrain_200b_8k": (25_066_252, 8192, 205.3e9),
        "pretrain_100b_32k": (3_051_757, 32_768, 100e9),
    }[name.split("/")[0]]
    assert (found["samples"], config.model.seq_length) == (samples, length)
    assert samples * length == pytest.approx(tokens, rel=1e-3)
    assert config.train.global_batch_size == 1024
    assert (config.model.rotary_base, config.model.vocab_size) == (10_000, 256)
    assert found["samples_trained"] == found["steps"] * 1024 == samples // 1024 * 1024


@pytest.mark.parametrize("name", [name for name in PAPER if load(name).model.gengram.enabled])
def test_memory_has_the_papers_tables(name):
    config = load(name)
    gengram, found = config.model.gengram, planned(config)
    assert found["parameters"]["tables"] == 19_530 * 1024 * len(gengram.layers)
    if gengram.layers == [3, 6, 10]:
        assert found["parameters"]["tables"] == 59_996_160
    assert gengram.kmer_sizes == [1, 2, 3, 4, 5, 6]


def test_sweeps_vary_one_thing():
    sweeps = {
        "layer_sweep/layer_": [(f"{n:02}", {"layers": [n], "window": None}) for n in range(1, 13)],
        "window_sweep/window_": [(f"{w:02}", {"layers": [10], "window": w}) for w in WINDOWS],
        "layer_sets/layers_": [
            ("_".join(map(str, layers)), {"layers": layers, "window": 21})
            for layers in ([10, 11, 12], [9, 10, 11, 12], [3, 6, 10], [3, 6], [3, 10])
        ],
    }
    baseline, expected = load("ablation_50b_8k/baseline"), set()
    for prefix, runs in sweeps.items():
        for end, memory in runs:
            name = f"ablation_50b_8k/{prefix}{end}"
            gengram = baseline.model.gengram.model_copy(update={"enabled": True, **memory})
            model = baseline.model.model_copy(update={"gengram": gengram})
            run = baseline.model_copy(update={"model": model})
            assert without_folder(load(name)) == without_folder(run), name
            expected.add(name)
    folders = tuple(f"ablation_50b_8k/{prefix.split('/')[0]}/" for prefix in sweeps)
    assert {name for name in RUNS if name.startswith(folders)} == expected


def test_the_grid_has_every_architecture_with_and_without_memory():
    """Two of its cells are runs of other tables."""
    grid = [n for n in RUNS if n.startswith("ablation_50b_8k/architecture/")]
    grid += ["ablation_50b_8k/baseline", "ablation_50b_8k/layer_sets/layers_3_6_10"]
    cells = set()
    for name in grid:
        model = load(name).model
        kind = "dense" if model.num_experts is None else "moe"
        cells.add((kind, model.attention, model.gengram.enabled))
        assert model.gengram.layers == [3, 6, 10] and model.gengram.window == 21
        if model.attention == "mla":
            sizes = (512, 128, 128, 256) if kind == "dense" else (256, 64, 64, 128)
            mla = model.mla
            assert sizes == (
                mla.kv_lora_rank,
                mla.qk_head_dim,
                mla.qk_pos_emb_head_dim,
                mla.v_head_dim,
            )
    assert len(cells) == len(grid) == 12


@pytest.mark.parametrize("folder", ["pretrain_200b_8k", "pretrain_100b_32k"])
@pytest.mark.parametrize("name", FORMAL)
def test_formal_runs_fit_their_gpus(folder, name):
    config = load(f"{folder}/{name}")
    assert planned(config, GPUS)["warnings"] == []
    gengram = config.model.gengram
    assert gengram.enabled == (name != "baseline")
    if gengram.enabled:
        assert gengram.window == (21 if name.endswith("21") else None)


RELEASED = {"genos_1.2b": 128, "genos_10b": 256, "gengram_10b": 128}
"""The published weights, and their padded vocabulary."""


def test_released_models_have_a_run_and_a_continued_one():
    expected = {f"genos/{name}{end}" for name in RELEASED for end in ("", "_cpt")}
    assert set(GENOS) == expected


@pytest.mark.parametrize("name", GENOS)
def test_released_models_are_those_of_their_launches(name):
    config, released = load(name), name.removeprefix("genos/").removesuffix("_cpt")
    model = config.model
    assert model.vocab_size == RELEASED[released]
    assert model.vocab_size % config.parallel.tensor == 0
    assert model.gengram.enabled == (released == "gengram_10b")
    if model.gengram.enabled:
        assert (model.gengram.layers, model.gengram.window) == ([3, 6, 10], 21)
    base = 10_000 if released == "gengram_10b" else 50_000_000
    assert model.rotary_base == base
    assert model.seq_length == (32_768 if name.endswith("_cpt") else 8192)
    assert (config.train.global_batch_size, config.train.micro_batch_size) == (1024, 1)
    if released == "gengram_10b":  # its memory besides the model of Genos-10B
        smaller = load("genos/genos_10b", "model.vocab_size=128")
        counted = count_parameters(config)
        assert counted.total - counted.gengram == count_parameters(smaller).total


@pytest.mark.parametrize("name", GENOS)
def test_released_models_fit_the_gpus_that_their_configs_start(name):
    config = load(name)
    gpus = config.launch.nodes * config.launch.processes
    assert gpus == (64 if "1.2b" in name else GPUS)
    assert planned(config, gpus)["warnings"] == []


@pytest.mark.parametrize("words", [["parallel.pipeline=1", "parallel.expert=1"]])
def test_the_other_published_layout_of_genos_10b_fits_too(words):
    text = RUNS["genos/genos_10b"].read_text()
    assert " ".join(words) in text
    assert planned(load("genos/genos_10b", *words), GPUS)["warnings"] == []


CONTINUED = [
    *((f"pretrain_200b_8k/{name}", f"pretrain_100b_32k/{name}") for name in FORMAL),
    *((f"genos/{name}", f"genos/{name}_cpt") for name in RELEASED),
]


@pytest.mark.parametrize(("first", "continued"), CONTINUED)
def test_continued_runs_start_from_the_weights_of_the_first(first, continued):
    source, config = load(first), load(continued)
    assert config.checkpoint.load == source.run.dir
    assert source.checkpoint.load is None
    # Raises if it is not.
    check_same_model(Path(source.run.dir), source.model.model_dump(), config, new_run=True)


def test_gengram_10b_is_the_formal_run_with_its_launchs_vocabulary():
    """Data, optimizer and model; not how it is computed and saved."""
    ours, formal = load("genos/gengram_10b"), load("pretrain_200b_8k/gengram_window_21")
    wanted = formal.model.model_copy(update={"vocab_size": 128})
    assert ours.model == wanted
    assert ours.data.path == formal.data.path and ours.train.samples == formal.train.samples
    overlaps = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    assert ours.optimizer.model_copy(update=overlaps) == formal.optimizer
    assert ours.optimizer != formal.optimizer


def test_the_readme_of_the_released_models_names_every_file():
    text = (CONFIGS / "genos/README.md").read_text()
    named = set(re.findall(r"`(\w+[\w.]*)\.yaml`", text))
    assert {f"genos/{name}" for name in named} == set(GENOS)


@pytest.mark.parametrize("name", [name for name in PAPER if name.startswith("ablation")])
def test_ablations_fit_one_node(name):
    assert planned(load(name), 8)["warnings"] == []


def data_sets() -> set[tuple[str, int]]:
    """Folder and bases a sample of what configs/data builds, as it is and by the commands that
    comments give."""
    commands = {(str(path), "") for path in CONFIGS.glob("data/*.yaml")}
    for path in CONFIGS.rglob("*.yaml"):
        commands |= set(re.findall(r"gengram-data build (\S+)(.*)", path.read_text()))
    built = [load_config(ROOT / file, words.split(), DataConfig) for file, words in commands]
    return {(str(data.output), data.seq_length) for data in built}


def test_every_run_reads_a_data_set_of_its_length_that_can_be_built():
    read = {name: load(name) for name in RUNS}
    for path in SWEEPS:
        read |= {f"{path.name}, {run.name}": run.config for run in read_sweep(path, []).runs}
    built = data_sets()
    for name, config in read.items():
        assert (config.data.path, config.model.seq_length) in built, name


@pytest.mark.parametrize(
    "sweep, member, single",
    [
        ("windows", "window-6", "window_sweep/window_06"),
        ("windows", "window-null", "layer_sweep/layer_10"),
        ("layers", "layers-1", "layer_sweep/layer_01"),
    ],
)
def test_members_of_sweeps_are_runs_of_the_ablations(sweep, member, single):
    """Apart from their folders and how they start."""
    runs = read_sweep(CONFIGS / f"sweeps/{sweep}_50b_8k.yaml", []).runs
    [found] = [run.config for run in runs if run.name == member]
    wanted = load(f"ablation_50b_8k/{single}")
    assert found.model_copy(update={"run": wanted.run, "launch": wanted.launch}) == wanted


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("smoke/")])
def test_smoke_runs_start_as_their_comments_say(name):
    config, text = load(name), RUNS[name].read_text()
    assert (config.launch.processes or 1) == smallest_world(config)
    assert "torchrun" not in text
    assert config.launch.slurm.gpus == (0 if name.endswith("cpu") else None)
    if name.endswith("cpu"):
        command = "launch" if config.launch.processes else "train"
        assert f"gengram {command} configs/{name}.yaml\n" in text


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("smoke/")])
def test_each_family_has_a_small_twin(name):
    config = load(name)
    assert count_parameters(config).total < 1e7 or name == "smoke/moe_1.2b_8k_one_gpu"
    assert smallest_world(config) == 1 or name.endswith("cpu")
    if name.endswith("_cpu"):
        assert name.replace("_cpu", "_one_gpu") in RUNS


def test_the_readme_names_every_file_and_no_other():
    text = (CONFIGS / "README.md").read_text()
    named = set()
    for line in text.splitlines():
        files = re.findall(r"`([\w./]+)\.yaml`", line)
        folder = files[0].rpartition("/")[0] if files else ""
        for file in files:
            full = file if "/" in file or file == "baseline" else f"{folder}/{file}"
            named.add(full if full.startswith("pretrain") else f"ablation_50b_8k/{full}")
    assert named <= set(RUNS)
    ranges = ("ablation_50b_8k/layer_sweep/", "ablation_50b_8k/window_sweep/")
    assert {n for n in PAPER if not n.startswith(ranges)} <= named
    assert ", ".join(map(str, WINDOWS)) in text
