"""What pickled files of others may hold."""

import os
from pathlib import Path


class Evil:
    """What a pickle can do to those who load it."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


class Attribute:
    """Pickled as early Pythons 3.11 pickle a member of an enumeration."""

    def __init__(self, of: object, name: str):
        self.of, self.name = of, name

    def __reduce__(self):
        return getattr, (self.of, self.name)
