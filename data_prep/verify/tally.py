"""Documents that share a fault, told in one sentence."""

import numpy as np

NAMED = 3


class Tally:
    """Counts documents and remembers the first few: one fault may concern millions."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[int] = []

    def add(self, numbers: np.ndarray) -> None:
        """Add documents [n] by number."""
        self.count += len(numbers)
        self._first += numbers[: NAMED - len(self._first)].tolist()

    def __str__(self) -> str:
        """Such as `12 documents (4, 8, 15, ...)`."""
        more = ", ..." if self.count > len(self._first) else ""
        noun = "document" if self.count == 1 else f"{self.count:,} documents"
        return f"{noun} {', '.join(map(str, self._first))}{more}"
