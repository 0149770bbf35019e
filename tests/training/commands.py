"""Many `gengram train` commands, one after the other, each in processes that are forked from one
group: they share the start of Python and the imports, and nothing else."""

import io
import json
import multiprocessing
import os
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import torch.distributed as dist

from gengram_megatron.errors import EXIT_CODE, NOT_FINITE


def run_all(jobs: dict[str, list[str]], folder: Path) -> None:
    """What each rank does. JOBS: name to the words after `gengram`; each rank writes
    FOLDER/<name>.<rank>.json, the exit code and what the command printed."""
    from gengram_megatron.engine import processes

    multiprocessing.set_start_method("fork", force=True)  # the default where nothing was forked
    os.environ["COLUMNS"] = "400"
    rank, ranks = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
    for name, words in jobs.items():
        if ranks > 1:
            processes._store = partial(_meet, folder / f"{name}.store")
        said = folder / f"{name}.{rank}.json"
        # The hundreds of threads of gloo that a job starts end with its process alone.
        job = multiprocessing.Process(target=_run, args=(words, said))
        job.start()
        job.join()
        assert job.exitcode == 0, f"job {name} ended with {job.exitcode}"
        result = json.loads(said.read_text())
        if result["code"] not in (0, EXIT_CODE, NOT_FINITE):  # the other ranks may be waiting
            sys.exit(f"job {name}: {result['err']}")


def _meet(file: Path, world_size: int, rank: int) -> dist.Store:
    """Each group of processes finds each other through a file of its own."""
    return dist.FileStore(str(file), world_size)


def _run(words: list[str], said: Path) -> None:
    """One command; its exit code and output go to the file `said`."""
    from gengram_megatron.commands.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["gengram", *words]
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        except Exception:  # as an interpreter would show it
            code = 1
            traceback.print_exc()
    result = {"code": code, "out": out.getvalue(), "err": err.getvalue()}
    said.write_text(json.dumps(result))
