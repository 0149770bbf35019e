"""The folder in which a data set is built, and from which an interrupted build resumes.

It lies beside the output `NAME`, is called `NAME.building`, and contains

    lock         held by the process that builds
    surveys/     the survey of each source that was read once
    data/        the files of the data set, which becomes the output when they are complete
    written/     an empty file for each source whose fragments are in data/
    replaced/    for a moment, the data set that is being replaced
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from data_prep.sources import Input
from data_prep.survey import Survey
from gengram_megatron import __version__
from gengram_megatron.errors import UserError
from gengram_megatron.files import Locked, flush, lock, replacing

LOCK = "lock"


class BuildDirectory:
    """The folder of a build in progress; see `open_build_directory`."""

    def __init__(self, output: Path):
        self._output = output
        self.folder = output.with_name(f"{output.name}.building")
        self.data = self.folder / "data"
        self._surveys, self._written = self.folder / "surveys", self.folder / "written"
        self._replaced = self.folder / "replaced"

    def survey_of(self, source: Input, settings: Any) -> Survey | None:
        """Returns the survey that an earlier start has made of a source with the same settings.

        Returns None if there is none, or a file of the source has changed since.
        """
        path = self._survey_path(source, settings)
        if not path.is_file():
            return None
        survey = Survey.load(path)
        return survey if survey.stamps == source.stamps() else None

    def keep_survey(self, source: Input, settings: Any, survey: Survey) -> None:
        """Stores the survey of a source."""
        self._surveys.mkdir(exist_ok=True)
        path = self._survey_path(source, settings)
        with replacing(path) as beside:
            survey.save(beside)

    def _survey_path(self, source: Input, settings: Any) -> Path:
        identity = [source.key, source.settings.model_dump(mode="json"), settings]
        return self._surveys / f"{_digest(identity)}.npz"

    def prepare_data(self, identity: Any, prepare: Callable[[Path], None]) -> None:
        """Makes data/ ready for the data set that `identity` describes.

        What an earlier start has written of the same data set stays; otherwise data/ is emptied,
        and `prepare` is called with its path.
        """
        marker = self._written / _digest(identity)
        if marker.exists() and self.data.exists():
            return
        for folder in (self._written, self.data):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        prepare(self.data)
        marker.touch()

    def is_written(self, source: Input) -> bool:
        """Returns whether the fragments of a source are in data/."""
        return self._written_path(source).exists()

    def mark_written(self, source: Input) -> None:
        """Flushes the fragments of a source, which are in data/, to the disk and records that they
        are written."""
        for path in self.data.iterdir():
            flush(path)
        self._written_path(source).touch()

    def _written_path(self, source: Input) -> Path:
        return self._written / f"{source.group}.{source.name}"

    def publish(self, replace: bool) -> None:
        """Moves the complete data set to the output path and removes this folder.

        Raises OSError if another data set was created there in the meantime, unless `replace` is
        set.
        """
        for path in [*self.data.iterdir(), self.data]:
            flush(path)
        if replace and self._output.exists():
            self._output.rename(self._replaced)
        self.data.rename(self._output)
        flush(self._output.parent)
        shutil.rmtree(self.folder)

    def restore(self) -> None:
        """Undoes or completes a replacement during which an earlier start was killed."""
        if self._output.exists():
            shutil.rmtree(self._replaced, ignore_errors=True)
        elif self._replaced.exists():
            self._replaced.rename(self._output)


@contextmanager
def open_build_directory(output: Path) -> Iterator[BuildDirectory]:
    """Opens the folder of the build of `output`, for this process alone.

    After an error it is kept for the next start if a source has been surveyed, otherwise removed.
    Raises UserError if another process builds the same output, or writing fails.
    """
    work = BuildDirectory(output)
    try:
        with _locked(work.folder, output):
            work.restore()
            try:
                yield work
            finally:
                if not (work.folder / "surveys").exists():
                    shutil.rmtree(work.folder, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{output} could not be written: {error.strerror or error}") from error


@contextmanager
def _locked(folder: Path, output: Path) -> Iterator[None]:
    """Holds the folder's lock; raises UserError if another process holds it."""
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            try:
                file = held.enter_context(lock(path))
            except FileNotFoundError:  # a build has just ended and removed its folder
                continue
            except Locked as holder:
                raise UserError(
                    f"{output} is being built by another process, {holder}; wait for it, or give "
                    "another output"
                ) from None
            if os.fstat(file.fileno()).st_nlink:  # otherwise it was removed with such a folder
                yield
                return


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps([__version__, values]).encode()).hexdigest()[:32]
