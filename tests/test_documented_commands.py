"""Every command that the READMEs, the help texts and the configs' first lines show is one that
works: run where that is quick, else with --dry-run, else parsed and its config checked.

A command that no way of checking is written for fails, so that no example goes untried.
"""

import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from data_prep.cli import program
from data_prep.download.schema import DownloadConfig
from data_prep.schema import DataConfig
from gengram_megatron.commands.cli import app
from gengram_megatron.config.layout import check_layout
from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.errors import UserError
from tests.layouts.launch import ROOT

READMES = [
    path
    for path in sorted(ROOT.rglob("README.md"))
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROGRAMS = {"gengram": app, "gengram-data": program([])}
STARTS = re.compile(r"^(gengram|gengram-data|torchrun|python|bash|pip|source|sbatch|srun) ")


def fenced(path: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCED.findall(path.read_text()) if language in languages]


def commands_of_readmes() -> Iterator[tuple[str, str]]:
    for path in READMES:
        for text in fenced(path, "bash", "sh", "console", ""):
            lines = text.replace("\\\n", " ").splitlines()
            shows_output = any(line.startswith("$ ") for line in lines)
            for line in lines:
                if line.strip() and (line.startswith("$ ") or not shows_output):
                    yield str(path.relative_to(ROOT)), line.removeprefix("$ ").strip()


def typer_commands(name: str, command) -> Iterator[tuple[str, object]]:
    """All commands below one, by the words that call them."""
    yield name, command
    for word, below in getattr(command, "commands", {}).items():
        yield from typer_commands(f"{name} {word}", below)


HELP = {
    words: command.help or ""
    for name, application in PROGRAMS.items()
    for words, command in typer_commands(name, typer.main.get_command(application))
}


def commands_of_help() -> Iterator[tuple[str, str]]:
    for words, text in HELP.items():
        lines = text.splitlines()
        for number, line in enumerate(lines):
            if line.startswith("  ") and STARTS.match(line.strip()):
                command = line.strip()
                while command.count("'") % 2:  # a quoted text of several lines
                    number += 1
                    command += "\n" + lines[number].strip()
                yield f"{words} --help", command


def commands_of_configs() -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        for line in path.read_text().splitlines():
            if line.startswith("#   "):
                command = line.removeprefix("#").strip()
                if STARTS.match(command):
                    yield str(path.relative_to(ROOT)), command


SHOWN = [*commands_of_readmes(), *commands_of_help(), *commands_of_configs()]
SHOWN = list({command: (where, command) for where, command in reversed(SHOWN)}.values())[::-1]


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Iterator[Path]:
    """A folder that looks as the examples need it: the checkout, a data set, and my_run.yaml."""
    folder = tmp_path_factory.mktemp("documented")
    for name in ("configs", "sample_data", "scripts", "setup.py"):
        (folder / name).symlink_to(ROOT / name)
    for text in fenced(ROOT / "README.md", "yaml"):
        name = re.match(r"# (\S+\.yaml)\n", text)
        if name:
            (folder / name[1]).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "200")
        run("gengram-data", ["build", "configs/data/sample.yaml"])
        run("gengram", ["init", "data", *map(str, Path().glob("sample_data/*.fa.gz"))])
        run("gengram-data", ["build", "my_data.yaml"])
        yield folder


def run(name: str, words: list[str]) -> str:
    """What a command prints; it must not fail."""
    done = CliRunner().invoke(PROGRAMS[name], words)
    assert done.exit_code == 0, f"{done.output}\n{done.exception}"
    return done.output


def parsed(name: str, words: list[str]) -> dict:
    """The arguments and options of a command, by its function's names."""
    command, rest = typer.main.get_command(PROGRAMS[name]), list(words)
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    return command.make_context(name, rest).params


def check_config(name: str, words: list[str], processes: int | None = None) -> None:
    """The config of a command is in order, for so many processes if it is a run's."""
    given = parsed(name, words)
    schema = {"gengram": Config, "download": DownloadConfig}.get(name) or (
        DownloadConfig if words[0] == "download" else DataConfig
    )
    loaded = load_config(given["config"], list(given["overrides"] or []), schema)
    if schema is Config:
        check_layout(loaded, processes or loaded.launch.nodes * (loaded.launch.processes or 1))


def gengram(words: list[str], shown: str) -> None:
    name = words[0]
    if name in ("config", "plan"):
        run("gengram", words)
    elif name == "init":  # to another place, as what it would write was written before
        Path("shown.yaml").unlink(missing_ok=True)
        files = [str(path) for word in words if "*" in word for path in Path().glob(word)]
        words = [*(word for word in words if "*" not in word), *files]
        run("gengram", [*words, "--output", "shown.yaml"])
    elif name == "launch":
        run("gengram", [*words, "--dry-run"])
    elif name == "sweep":
        here = [word for word in words if word != "--results"]  # nothing has been trained here
        run("gengram", [*here, "--dry-run"] if "--launch" in here else here)
    elif name == "train":
        check_config("gengram", words, processes=1)
    elif name == "doctor":
        if len(words) > 1:
            check_config("gengram", words)
    elif name == "checkpoint":
        given = parsed("gengram", words)
        if given.get("config") and not (given["new_config"] or given["print_config"]):
            check_config("gengram", words)
    else:
        raise AssertionError(f"no way of checking `{shown}` is written here")


def gengram_data(words: list[str], shown: str) -> None:
    if words[:2] in (["build", "configs/data/sample.yaml"], ["build", "my_data.yaml"]):
        run("gengram-data", words)
    elif words[0] in ("build", "download"):  # of genomes that are not here
        check_config("gengram-data", words)
    elif words[0] in ("inspect", "verify", "init"):
        parsed("gengram-data", words)
    else:
        raise AssertionError(f"no way of checking `{shown}` is written here")


def torchrun(words: list[str], shown: str) -> None:
    at = words.index("-m")
    assert words[at + 1] == "gengram_megatron"
    ranks = words[words.index("--nproc-per-node") + 1]
    check_config("gengram", words[at + 2 :], processes=int(ranks))


def bash(words: list[str], shown: str) -> None:
    subprocess.run(["bash", "-n", words[0]], check=True)


def python(words: list[str], shown: str) -> None:
    assert words[0] == "-c"
    compile(words[1], shown, "exec")


WAYS: dict[str, Callable[[list[str], str], None]] = {
    "gengram": gengram,
    "gengram-data": gengram_data,
    "torchrun": torchrun,
    "bash": bash,
    "python": python,
}


@pytest.mark.parametrize("where, command", SHOWN, ids=[": ".join(one) for one in SHOWN])
def test_a_command_that_is_shown_works(here: Path, where: str, command: str):
    assert_output = expected_output(where, command)
    name, *words = shlex.split(command, comments=True)
    assert name in WAYS, f"no way of checking `{command}` is written here"
    if assert_output is None:
        WAYS[name](words, command)
    else:
        done = CliRunner().invoke(PROGRAMS[name], words)
        assert isinstance(done.exception, UserError)
        assert assert_output == [f"gengram: {line}" for line in str(done.exception).splitlines()]


def expected_output(where: str, command: str) -> list[str] | None:
    """The lines that a README shows below a command after `$ `."""
    if not (ROOT / where).is_file():
        return None
    for text in fenced(ROOT / where, "bash", "sh", "console", ""):
        _, prompt, after = text.partition(f"$ {command}\n")
        if prompt:
            return after.partition("\n$ ")[0].splitlines()
    return None


@pytest.mark.parametrize("path", READMES, ids=[str(path.relative_to(ROOT)) for path in READMES])
def test_yaml_that_is_shown_is_a_config(here: Path, tmp_path: Path, path: Path):
    for text in fenced(path, "yaml"):
        file = here / "shown.yaml"
        if "base:" in text:
            file.write_text(text)
        else:  # a part of a run's config
            file.write_text(f"base: configs/smoke/one_gpu.yaml\n{text}")
        words = ["data.path=null"] if "blend:" in text else []
        load_config(file, words, Config)


def test_examples_were_found():
    assert len(HELP) >= 16 and len(SHOWN) >= 50
    assert {command.split()[0] for _, command in SHOWN} >= {"gengram", "gengram-data", "torchrun"}
