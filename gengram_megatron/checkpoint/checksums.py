"""Checksums of a checkpoint's files, in a file beside them that `sha256sum -c` reads, too."""

from collections.abc import Iterable
from pathlib import Path

from gengram_megatron.errors import UserError
from gengram_megatron.files import checksum, flush

MANIFEST = "checksums.sha256"


def write_manifest(folder: Path, known: dict[str, str]) -> None:
    """Note the checksums of all files of a folder, and flush.

    known: those that are there already, by file name; the others are computed.
    """
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
    lines = (f"{known.get(name) or checksum(folder / name)}  {name}\n" for name in names)
    (folder / MANIFEST).write_text("".join(lines))
    flush(folder / MANIFEST)


def read_manifest(folder: Path) -> dict[str, str]:
    """The checksums by file name.

    Raises ValueError, in words, if the manifest is not whole.
    """
    try:
        lines = (folder / MANIFEST).read_text().splitlines()
        return {name: digest for digest, name in (line.split("  ") for line in lines)}
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except OSError as error:
        raise ValueError(f"{MANIFEST} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{MANIFEST} is not a list of checksums and names") from None


def damage(folder: Path, share: int = 0, shares: int = 1) -> list[str]:
    """What is wrong with a checkpoint's files, a phrase each; none if it is whole.

    share, shares: reads only every shares-th file, so that many processes can do it together.
    """
    try:
        expected = read_manifest(folder)
    except ValueError as error:
        return [str(error)]
    names = sorted(expected)[share::shares]
    return [
        *_unknown(folder, expected),
        *_changed(folder, {name: expected[name] for name in names}),
    ]


def _unknown(folder: Path, expected: Iterable[str]) -> list[str]:
    there = {path.name for path in folder.iterdir()}
    return [f"{MANIFEST} lacks {name}" for name in sorted(there - {MANIFEST, *expected})]


def _changed(folder: Path, expected: dict[str, str]) -> list[str]:
    found = []
    for name, digest in expected.items():
        try:
            if checksum(folder / name) != digest:
                found.append(f"{name} is not what was written")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read: {error.strerror}")
    return found


def check_whole(folder: Path) -> None:
    """UserError: a checkpoint's files are not what was written, so nothing is to be made of them."""
    if problems := damage(folder):
        raise UserError(
            f"{folder} is damaged: {'; '.join(problems)}; take an earlier checkpoint of the run"
        )
