"""A folder appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gengram_megatron.errors import UserError
from gengram_megatron.files import flush


@contextmanager
def published(output: Path, replace: bool) -> Iterator[Path]:
    """Give a folder to write in that becomes `output` only if the block ends well.

    With `replace`, a folder that stood there before is replaced at that moment; without, one that
    came to be in the meantime stays, and that is an error. After an error nothing is left;
    a process that was killed leaves `<output>.partial-<pid>`, which no one takes for a data set.
    """
    partial = output.with_name(f"{output.name}.partial-{os.getpid()}")
    replaced = output.with_name(f"{output.name}.replaced-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a killed process that had our number
        partial.mkdir(parents=True)
        yield partial
        for path in [*partial.iterdir(), partial]:
            flush(path)
        if replace and output.exists():
            output.rename(replaced)
        partial.rename(output)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{output} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
