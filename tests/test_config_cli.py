"""The command `gengram` as a user meets it: help, configs, and mistakes without a traceback."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from data_prep.cli import program
from data_prep.schema import DataConfig
from gengram_megatron import __version__
from gengram_megatron.commands.cli import app, main
from gengram_megatron.config.command_line import print_keys
from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.errors import UserError

ROOT = Path(__file__).parent.parent
SMOKE = ROOT / "configs" / "smoke"
LAUNCHER_VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_NTASKS", "SLURM_PROCID")


def gengram(*words: str | Path, **variables: str) -> subprocess.CompletedProcess:
    """Run the command in a process of its own, with nothing of a launcher but `variables`."""
    clean = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
    return subprocess.run(
        [sys.executable, "-m", "gengram_megatron", *map(str, words)],
        env=clean | variables, cwd=ROOT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip


ONE_GPU = SMOKE / "one_gpu.yaml"
MISTAKES = {
    "no file": (["none.yaml"], "there is no config file none.yaml"),
    "wrong key": ([ONE_GPU, "train.lr=1"], "did you mean optimizer.lr?"),
    "wrong value": ([ONE_GPU, "train.steps=many"], "train.steps is the text 'many'"),
    "wrong choice": ([ONE_GPU, "train.precision=fp16"], "it must be bf16, fp32 or fp8"),
    "wrong word": ([ONE_GPU, "train.steps"], "is not of the form key=value"),
    "wrong YAML": ([ONE_GPU, "run.dir={"], "this is not valid YAML"),
    "world size": ([SMOKE / "cpu.yaml"], "the world size is 1, which is not a multiple of"),
    "heads": ([ONE_GPU, "model.num_attention_heads=3"], "not a multiple of model.num_query_groups"),
    "groups": ([ONE_GPU, "model.num_query_groups=3"], "model.num_query_groups = 3"),
    "experts": ([ONE_GPU, "model.moe_router_topk=5"], "model.moe_router_topk is 5"),
    "layers": ([ONE_GPU, "model.gengram.layers=[5]"], "model.gengram.layers names [5]"),
    "window": ([ONE_GPU, "model.gengram.window=5"], "model.gengram.window is 5"),
    "no checkpoint": ([ONE_GPU, "checkpoint.load=configs"], "checkpoint.load is configs"),
    "batch": ([ONE_GPU, "train.micro_batch_size=3"], "train.global_batch_size is 8"),
}


@pytest.mark.parametrize("words, says", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_sentences(words, says, monkeypatch, capsys):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["gengram", "train", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out) == (2, "")
    assert all(line.startswith("gengram: ") for line in printed.err.splitlines())
    assert says in printed.err


def test_a_mistake_ends_the_process_without_a_traceback():
    words, says = MISTAKES["wrong key"]
    done = gengram("train", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr and "Traceback" not in done.stderr


def test_a_mistake_that_more_processes_do_not_mend_is_told_alone():
    words = ("parallel.tensor=1", "parallel.pipeline=1", "model.hidden_size=130")
    done = gengram("train", SMOKE / "cpu.yaml", *words)
    assert "model.hidden_size is 130" in done.stderr
    assert "global_batch_size" not in done.stderr  # as it is on four processes


@pytest.mark.parametrize(("words", "processes"), [((), 4), (("parallel.pipeline=4",), 8)])
def test_one_process_where_more_are_needed_is_told_the_command(words, processes):
    words = (*words, "run.dir=runs/my run")
    done = gengram("train", SMOKE / "cpu.yaml", *words)
    command = shlex.split(done.stderr.splitlines()[-1].partition(" gengram ")[2])
    assert command == ["launch", str(SMOKE / "cpu.yaml"), "--nproc", str(processes), *words]
    assert f"--nproc-per-node={processes}" in gengram(*command, "--dry-run").stdout
    beyond = gengram("train", SMOKE / "cpu.yaml", "model.num_attention_heads=5")
    assert "gengram launch" not in beyond.stderr  # which would not start either


def test_one_rank_of_a_machine_tells_the_mistake():
    words, world = ("train", ONE_GPU, "train.lr=1"), {"WORLD_SIZE": "2"}
    first = gengram(*words, **world, RANK="0", LOCAL_RANK="0")
    second = gengram(*words, **world, RANK="1", LOCAL_RANK="1")
    assert (first.returncode, second.returncode) == (2, 2)
    assert "did you mean optimizer.lr?" in first.stderr
    assert second.stderr == ""


def test_wrong_launcher_environment():
    done = gengram("train", ONE_GPU, WORLD_SIZE="four", RANK="0")
    assert done.returncode == 2
    assert done.stderr.startswith("gengram: the environment has WORLD_SIZE=four")


def test_config_prints_a_config(tmp_path):
    done = gengram("config", ONE_GPU, "optimizer.lr=3e-4", "model.gengram.window=null")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["optimizer"]["lr"] == 3e-4
    path = tmp_path / "printed.yaml"
    path.write_text(done.stdout)
    words = ["optimizer.lr=3e-4", "model.gengram.window=null"]
    assert load_config(path, [], Config) == load_config(ONE_GPU, words, Config)


def test_config_lists_keys_one_a_line():
    done = gengram("config", "--keys", COLUMNS="40")
    assert done.returncode == 0, done.stderr
    heading, *lines = (line.split("\t") for line in done.stdout.splitlines())
    found = {line[0]: dict(zip(heading, line)) for line in lines}
    assert len(found) == len(lines) and all(len(line) == 4 for line in lines)
    assert found["model.attention"]["may be"] == "mha, gqa or mla"
    assert found["model.gengram.layers"]["default"] == "[3, 6, 10]"
    assert found["run.dir"]["default"] == "(required)"
    assert found["data.blend[].weight"]["may be"] == "a number greater than 0"


def test_config_explains_the_keys_that_are_named(capsys):
    def listed(*names: str) -> list[str]:
        print_keys(Config, [*names])
        return [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()[1:]]

    assert listed("optimizer.lr", "checkpoint.keep") == ["optimizer.lr", "checkpoint.keep"]
    assert listed("model.gengram.hashing") == [
        f"model.gengram.hashing.{name}" for name in ("rows", "heads", "seed")
    ]
    assert listed("data.blend.path") == ["data.blend[].path"]
    with pytest.raises(UserError) as error:
        listed("optimizer.lrr", "train.lr")
    assert str(error.value).count("did you mean optimizer.lr?") == 2
    print_keys(DataConfig, ["groups.human.sources.chm13.fasta"])
    assert capsys.readouterr().out.splitlines()[1].startswith("groups.NAME.sources.NAME.fasta\t")
    print_keys(Config, ["optimizer.lr"], as_json=True)
    assert json.loads(capsys.readouterr().out)[0]["default"] == 1e-4
    done = gengram("config", "--keys", "optimizer.lr", "run")
    assert done.stdout.count("\n") == 4, done.stderr
    assert gengram("config").returncode == 2


def test_help_teaches():
    done = gengram("train", "--help")
    assert done.returncode == 0
    for words in ("CONFIG", "optimizer.lr=3e-4", "torchrun", "resumes automatically"):
        assert words in done.stdout


def test_version():
    assert gengram("--version").stdout == f"gengram {__version__}\n"


def test_start_imports_no_torch():
    code = "import sys, gengram_megatron.commands.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_config_checks_the_layout_where_a_number_of_processes_is_given():
    done = gengram("config", SMOKE / "cpu.yaml", "--nproc", "3")
    assert done.returncode == 2
    assert "the world size is 3" in done.stderr
    assert gengram("config", SMOKE / "cpu.yaml", "--nproc", "4").returncode == 0


def test_a_run_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    from gengram_megatron.runs.folder import make_folder

    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be created"):
        make_folder(tmp_path / "file" / "run")


def test_plan_says_how_tables_are_split_and_why() -> None:
    words = [
        ONE_GPU,
        "model.gengram={kmer_sizes: [1, 6, 8, 12], dim: 1024, hashing: {rows: 16777216}}",
        "parallel.tensor=2",
        "train.global_batch_size=32",
    ]
    said = gengram("plan", *words, "--nproc", "8", "--json")
    assert said.returncode == 0, said.stderr
    tables = {table["name"]: table for table in json.loads(said.stdout)["tables"]}
    held = {
        name: (table["split"], table["over"], table["rows_per_rank"], table["columns_per_rank"])
        for name, table in tables.items()
    }
    assert held == {
        "k1": ("columns", "tensor", 5, 512),
        "k6": ("columns", "tensor", 15_625, 512),
        "k8": ("rows", "data", 97_657, 512),
        "k12_0": ("rows", "data", 4_194_304, 256),
        "k12_1": ("rows", "data", 4_194_300, 256),
    }
    assert tables["k6"]["reason"] == "k is at most 6"
    # bf16 weights, float32 gradients, and 12 bytes of Adam's over four data-parallel ranks.
    gib = 390_625 * 512 * (2 + 4 + 12 / 4) / 2**30
    assert tables["k8"]["reason"] == f"split by columns takes {gib:.2f} GiB per rank"
    shown = gengram("plan", *words, "--nproc", "8", COLUMNS="120")
    assert shown.returncode == 0 and "by columns" in shown.stdout


def test_plan_counts_what_config_says() -> None:
    from gengram_megatron.config.weights import count_parameters

    found = json.loads(gengram("plan", SMOKE / "cpu.yaml", "--nproc", "4", "--json").stdout)
    loaded = load_config(SMOKE / "cpu.yaml", [], Config)
    assert found["parameters"]["total"] == count_parameters(loaded).total
    assert found["tokens"] == found["samples"] * loaded.model.seq_length
    assert found["samples"] == found["steps"] * loaded.train.global_batch_size


def test_all_commands_know_h_and_are_listed_whole():
    for application in (app, program([])):
        command = typer.main.get_command(application)
        commands = [(), *((name,) for name in command.commands)]
        commands += [("checkpoint", "export")] if application is app else []
        for words in commands:
            done = [CliRunner().invoke(application, [*words, flag]) for flag in ("-h", "--help")]
            assert done[0].exit_code == 0 and done[0].output == done[1].output
        listed = CliRunner().invoke(application, ["--help"], env={"COLUMNS": "80"}).output
        assert "..." not in listed.partition("Commands:")[2]


@pytest.mark.parametrize(
    "module, name, typed, completed",
    [
        ("gengram_megatron.commands.cli", "gengram", "gengram sw", "sweep"),
        ("gengram_megatron.commands.cli", "gengram", "gengram launch --sl", "--slurm"),
        ("data_prep.cli", "gengram-data", "gengram-data bu", "build"),
    ],
)
def test_the_shell_completes(module, name, typed, completed):
    variable = f"_{name.replace('-', '_').upper()}_COMPLETE"
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" ")), variable: "complete_bash"}
    code = f"import sys; sys.argv = [{name!r}]; from {module} import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env={**os.environ, **words}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout.split()) == (0, [completed]), done.stderr
