"""Many `gengram train` commands, one after the other, in one group of processes: they share the
start of Python and the imports, and nothing else.

Started by launch.py: commands.py JOBS OUT. JOBS is a JSON object, name to the words after
`gengram`. Each rank writes OUT/<name>.<rank>.json: the exit code and what the command printed.
"""

import io
import json
import os
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import torch.distributed as dist

from gengram_megatron.cli import main

INIT_PROCESS_GROUP = dist.init_process_group


def run(words: list[str]) -> dict:
    """One command: its exit code and output."""
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
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def meet_by(file: Path, world: int) -> None:
    """Let the next group of processes find each other through a file: torchrun's store still has
    the addresses of the last one."""
    own = partial(INIT_PROCESS_GROUP, store=dist.FileStore(str(file), world))
    dist.init_process_group = lambda store, **settings: own(**settings)


if __name__ == "__main__":
    jobs, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    rank, ranks = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", "1"))
    for name, words in jobs.items():
        if ranks > 1:
            meet_by(folder / f"{name}.store", ranks)
        result = run(words)
        (folder / f"{name}.{rank}.json").write_text(json.dumps(result))
        if result["code"] not in (0, 2):
            print(f"job {name}, rank {rank}: {result['err']}", file=sys.stderr)
            sys.exit(1)  # the other ranks may be waiting
