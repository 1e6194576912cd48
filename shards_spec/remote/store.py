"""Read files at URLs (s3://, gs://, memory://, ...) through fsspec.

A read whose connection breaks is tried again.
"""

from __future__ import annotations

import errno
import importlib
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path, PosixPath
from typing import Any, TypeVar

from shards_spec.errors import ConfigError, GoneError, RemoteError
from shards_spec.files import URL, is_url

Result = TypeVar("Result")

CLIENTS = {"gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}  # that fsar[remote] does not bring
OUR_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # errors of our own disk, not of the place that is read
TRIES, PAUSE = 3, 0.5  # seconds before the second try, doubled each time; many clients try by themselves first


class RemotePath(PosixPath):
    """A file or folder at a URL, with the rules of a path; only `Remote` reads its content."""

    def __str__(self) -> str:
        """Return the URL; a relative path as it is."""
        text = super().__str__()
        match = URL.match(text)
        return f"{match['protocol']}://{text[match.end() :]}" if match else text


def place_of(text: str) -> Path:
    """Return the path of a text, or a `RemotePath` for a URL."""
    return RemotePath(text) if is_url(text) else Path(text.removeprefix("file://"))


class Remote:
    """A folder at a URL, for reading."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    @cached_property
    def _system(self) -> tuple[Any, str]:
        """The file system of the URL, and the folder's name in it."""
        protocol = self.url.partition("://")[0]
        try:
            fsspec = importlib.import_module("fsspec")
            system, root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            package = CLIENTS.get(protocol, '"fsar[remote]"')
            raise ConfigError(f"{self.url}: to read {protocol}:// install {package} with pip ({error})") from error
        except ValueError as error:
            raise ConfigError(f"{self.url}: {error}; give a path, or a URL such as s3://bucket/folder") from error
        return system, root

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file below the folder, by its name relative to the folder.

        Raises:
            RemoteError: the place refuses us, does not exist or does not answer.
        """
        system, root = self._system

        def find() -> dict[str, Any]:
            system.invalidate_cache()
            found: dict[str, Any] = system.find(root, detail=True)
            if not found:
                system.info(root)  # raises where there is no such place
            return found

        found = self._tried(find, self.url)
        return {name[len(root) :].lstrip("/"): int(info["size"] or 0) for name, info in found.items()}

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Read the bytes [start, stop) of a file; all of them by default.

        Raises:
            GoneError: there is no such file.
            RemoteError: the place refuses us or does not answer.
        """
        system, root = self._system
        data: bytes = self._tried(
            lambda: system.cat_file(f"{root}/{name}", start=start, end=stop), f"{self.url}/{name}"
        )
        return data

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file to `target`; a file that is there is replaced.

        Raises:
            GoneError: there is no such file.
            RemoteError: the place refuses us or does not answer.
            OSError: our own disk is full or cannot be written.
        """
        system, root = self._system
        self._tried(lambda: system.get_file(f"{root}/{name}", str(target)), f"{self.url}/{name}")

    def _tried(self, action: Callable[[], Result], url: str) -> Result:
        for count in range(1, TRIES + 1):
            try:
                return action()
            except FileNotFoundError as error:
                raise GoneError(f"{url} does not exist; check the name of the bucket and of the folder") from error
            except Exception as error:
                if isinstance(error, OSError) and error.errno in OUR_DISK:
                    raise
                if count == TRIES or _is_refusal(error):
                    raise RemoteError(_sentence(url, error)) from error
            time.sleep(PAUSE * 2 ** (count - 1))
        raise AssertionError  # the last try returns or raises


def _is_refusal(error: Exception) -> bool:
    """Tell whether it is of no use to try again.

    Each client has its own class for missing credentials, so their common name decides.
    """
    return isinstance(error, PermissionError) or "Credential" in type(error).__name__


def _sentence(url: str, error: Exception) -> str:
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    if _is_refusal(error):
        return f"{url}: access refused ({said}); check the credentials of this store and what they allow"
    return f"{url} cannot be read ({said}), tried {TRIES} times; check the connection and type the same command again"
