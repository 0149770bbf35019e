"""A file to fetch, before anything is known of what lies on the disk."""

from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Wanted:
    """The name a file is stored as, where it comes from, and its checksums where known."""

    name: str
    url: str
    checksums: dict[str, str]  # by hashlib's names, lower case


def web_address(url: str) -> str:
    """The https address of an object in a public S3 bucket; any other URL as it is."""
    if not url.startswith("s3://"):
        return url
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return f"https://{bucket}.s3.amazonaws.com/{key}"


def name_in(url: str) -> str:
    """The last part of a URL's path."""
    return unquote(PurePosixPath(urlsplit(url).path).name)
