"""What the download tests check."""

import hashlib
import re
from pathlib import Path


def md5(body: bytes) -> str:
    """MD5 in hexadecimal."""
    return hashlib.md5(body).hexdigest()


def check_refused(result: tuple[int, str, str], message: str) -> None:
    """Exit code 2 and one sentence that has the message."""
    code, _, shown = result
    assert code == 2, shown
    assert re.search(message, shown), shown
    assert shown.count("gengram: ") == 1 and "Traceback" not in shown


def left() -> list[str]:
    """Names in the output folder."""
    return sorted(path.name for path in Path("out").iterdir())
