"""The command `gengram train`: runs one process of a training run."""

import shlex
from pathlib import Path

import typer

from gengram_megatron.commands.plan import smallest_world
from gengram_megatron.config.command_line import ConfigFile, Overrides
from gengram_megatron.config.layout import (
    Layout,
    check_layout,
    is_first_on_its_node,
    world_size_from_environment,
)
from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.data_set import check_data_sets_exist
from gengram_megatron.errors import RankError, UserError
from gengram_megatron.runs.store import check_load
from gengram_megatron.signals import StopSignals


def train(context: typer.Context, config: ConfigFile, overrides: Overrides = None) -> None:
    """Train a model, or resume its training.

    CONFIG is a YAML file with the sections run, model, parallel, data, optimizer, train,
    checkpoint, logging and launch. Its key `base:` names files that it builds on; the file
    overrides them. `gengram config --keys` lists every key and its allowed values.

    Arguments of the form key=value override the file. Keys are written with dots, values as in
    YAML:

    \b
      gengram train configs/smoke/one_gpu.yaml optimizer.lr=3e-4
      gengram train configs/smoke/one_gpu.yaml 'model.gengram.layers=[2,3]'
      gengram train configs/smoke/one_gpu.yaml model.gengram.window=null

    Paths of what gengram and gengram-data write (run.dir, data.path, checkpoint.load) are relative
    to the current folder, also when a run reads them. Paths of files that you wrote or downloaded
    (base, data.tokenizer) are relative to the file that names them.

    With several processes, rank and world size come from torchrun or srun:

    \b
      torchrun --nproc-per-node 4 -m gengram_megatron train configs/smoke/cpu.yaml

    The world size must be a multiple of parallel.tensor * pipeline * context; the rest is
    data parallelism.

    A run resumes automatically: the same command with the same run.dir continues from the newest
    intact checkpoint there. For a new run give another folder, such as run.dir=runs/second.

    On SIGTERM or SIGUSR1, which batch systems send before a time limit, and on Ctrl-C, it finishes
    the step, saves a checkpoint and exits with code 75; the same command resumes from there. A
    second Ctrl-C ends it immediately, without saving.

    \b
    Exit codes: 0 done; 2 a mistake in config, data or files; 3 a loss or gradient that is not
    finite (train.on_nan); 70 a rank hung (train.watchdog_seconds); 75 saved, start it again.
    """
    try:
        loaded = load_config(config, overrides or [], Config)
        layout = _layout_here(loaded, config, overrides or [])
        if layout.world_size == 1:  # several ranks check this together, once they are connected
            check_load(loaded)
            check_data_sets_exist(loaded, config)
        # Entered before the slow imports, during which a signal would otherwise end the process
        # with a traceback.
        with StopSignals(announce=not context.obj and is_first_on_its_node()) as signals:
            from gengram_megatron.engine.training.run import train as run_training

            code = run_training(loaded, layout, signals)
    except UserError as error:
        if context.obj or is_first_on_its_node() or isinstance(error, RankError):
            raise
        raise typer.Exit(error.exit_code) from None
    if code:
        raise typer.Exit(code)


def _layout_here(loaded: Config, file: Path, overrides: list[str]) -> Layout:
    """Returns the layout on the processes that were started. If this is a single process and the
    config needs more, the error includes the command that starts enough."""
    world_size, _ = world_size_from_environment()
    try:
        return check_layout(loaded, world_size)
    except UserError as error:
        smallest, configured = smallest_world(loaded), loaded.launch.processes or 1
        wanted = smallest if configured % smallest else configured
        if world_size > 1 or smallest == 1 or loaded.launch.nodes > 1:
            raise  # not because of the number of processes
        check_layout(loaded, wanted)  # reports problems other than the number of processes
        command = shlex.join(["gengram", "launch", str(file), "--nproc", str(wanted), *overrides])
        raise UserError(f"{error}\nthis command starts {wanted} processes: {command}") from None
