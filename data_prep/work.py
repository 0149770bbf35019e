"""The folder in which a data set comes into being, and from which an interrupted build goes on.

Beside the output `NAME` it is called `NAME.building`, and holds

    lock         held by the process that builds
    surveys/     of each source that was read once, what is known of it
    data/        the files of the data set, which get their place when they are complete
    written/     of each source whose fragments are in data/, an empty file
    replaced/    for a moment, the data set that stood there before
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
    """The folder of a build that is under way; see `work_on`."""

    def __init__(self, output: Path):
        self._output = output
        self.folder = output.with_name(f"{output.name}.building")
        self.data = self.folder / "data"
        self._surveys, self._written = self.folder / "surveys", self.folder / "written"
        self._replaced = self.folder / "replaced"

    def survey_of(self, source: Input, settings: Any) -> Survey | None:
        """What an earlier start has found out about a source with the same settings, if its files
        are still the same."""
        path = self._survey_path(source, settings)
        if not path.is_file():
            return None
        found = Survey.load(path)
        return found if found.stamps == source.stamps() else None

    def keep_survey(self, source: Input, settings: Any, survey: Survey) -> None:
        """Keep what was found out about a source."""
        self._surveys.mkdir(exist_ok=True)
        path = self._survey_path(source, settings)
        with replacing(path) as beside:
            survey.save(beside)

    def _survey_path(self, source: Input, settings: Any) -> Path:
        own = [source.key, source.settings.model_dump(mode="json"), settings]
        return self._surveys / f"{_digest(own)}.npz"

    def prepare_data(self, plan: Any, prepare: Callable[[Path], None]) -> None:
        """Make data/ ready for the data set that `plan` stands for: what an earlier start has
        written of it stays, else data/ is emptied and `prepare` called with it."""
        marker = self._written / _digest(plan)
        if marker.exists() and self.data.exists():
            return
        for folder in (self._written, self.data):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        prepare(self.data)
        marker.touch()

    def is_written(self, source: Input) -> bool:
        """Whether the fragments of a source are in data/."""
        return self._written_path(source).exists()

    def mark_written(self, source: Input) -> None:
        """Have the disk hold the fragments of a source, which are in data/, and remember it."""
        for path in self.data.iterdir():
            flush(path)
        self._written_path(source).touch()

    def _written_path(self, source: Input) -> Path:
        return self._written / f"{source.group}.{source.name}"

    def publish(self, replace: bool) -> None:
        """Give the complete data set its place; one that came to be there in the meantime stays,
        and that is an error, unless it is to be replaced."""
        for path in [*self.data.iterdir(), self.data]:
            flush(path)
        if replace and self._output.exists():
            self._output.rename(self._replaced)
        self.data.rename(self._output)
        flush(self._output.parent)
        shutil.rmtree(self.folder)

    def restore(self) -> None:
        """Undo half of a replacement, or end it, if an earlier start was killed just there."""
        if self._output.exists():
            shutil.rmtree(self._replaced, ignore_errors=True)
        elif self._replaced.exists():
            self._replaced.rename(self._output)


@contextmanager
def work_on(output: Path) -> Iterator[BuildDirectory]:
    """The folder of the build of `output`, for this process alone.

    After an error it stays for the next start if a source has been surveyed, else it goes.
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
    """Hold the folder's lock."""
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            try:
                file = held.enter_context(lock(path))
            except FileNotFoundError:  # a build has ended this moment, and removed its folder
                continue
            except Locked as holder:
                raise UserError(
                    f"{output} is being built by another process, {holder}; wait for it, or give "
                    "another output"
                ) from None
            if os.fstat(file.fileno()).st_nlink:  # else it went with the folder of such a build
                yield
                return


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps([__version__, values]).encode()).hexdigest()[:32]
