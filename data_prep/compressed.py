"""Errors of files that may be compressed, in the user's words."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gengram_megatron.errors import UserError


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn what goes wrong in the block, which reads `path` with xopen, into UserErrors.

    xopen reads plain files, gzip (bgzip too), bzip2, xz and zstd; `kind` says what the text is
    meant to be, such as "a FASTA file".
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except UnicodeDecodeError:
        raise UserError(f"{path} is not {kind}: it is not text") from None
    except ImportError:  # the one compression that a Python may lack
        raise UserError(
            f"{path} is compressed with zstd, which this Python cannot read: "
            "pip install backports.zstd, or unpack the file"
        ) from None
    except Exception as error:  # each decompressor has errors of its own
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        raise UserError(
            f"{path} cannot be decompressed, it is truncated or damaged: {error}"
        ) from None
