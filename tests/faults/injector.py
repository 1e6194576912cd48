"""Every call that changes a folder, counted; one of them fails: an error, kill -9, or a cut of the mains."""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

Case = TypeVar("Case")

# ENOSPC: from this call on the disk is full. EIO: this call alone fails. A power cut loses what no fsync has made
# durable: half of what was written since, and with `names lost` renames and removals too: no journal need keep them.
ERRORS = ("ENOSPC", "EIO")
DEATHS = ("kill -9", "power cut, names kept", "power cut, names lost")
REFUSED_WHEN_FULL = {"open", "write", "mkdir", "link"}

_OPEN, _REPLACE = io.open, os.replace
_LINK, _UNLINK, _MKDIR, _RMDIR = os.link, os.unlink, os.mkdir, os.rmdir


class Injector:
    """Counts the calls that change `folder`, which threads may make; call number `at` meets `fault`."""

    def __init__(self, folder: Path, *, at: int = -1, fault: str = "") -> None:
        self.folder, self.at, self.fault = folder.resolve(), at, fault
        self.calls: Counter[str] = Counter()
        self.paths: list[str] = []  # of all calls, as they were given
        self.lock = threading.RLock()
        self._dirty: set[int] = set()  # inodes that were written since their last fsync
        self._durable: dict[int, int] = {}  # inode -> its bytes at that fsync
        self._undo: dict[Path, list[Callable[[], None]]] = {}  # folder -> how to undo what its fsync would keep

    @property
    def count(self) -> int:
        """Calls so far."""
        return self.calls.total()

    def meet(self, kind: str, path: object, half: Callable[[], object] = lambda: None) -> None:
        """Count a call; where it is the chosen one, `half` of it happens and then the fault."""
        number = self.count
        self.calls[kind] += 1
        self.paths.append(str(path))
        full = self.fault == "ENOSPC" and number > self.at >= 0 and kind in REFUSED_WHEN_FULL
        if number != self.at and not full:
            return
        half()
        if self.fault in DEATHS:
            if self.fault.startswith("power"):
                self._lose()
            os.kill(os.getpid(), signal.SIGKILL)
        code = getattr(errno, self.fault)
        raise OSError(code, os.strerror(code))

    def holds(self, path: object) -> bool:
        """Whether a path lies in the folder."""
        if not isinstance(path, str | os.PathLike):
            return False
        absolute = Path(os.path.abspath(os.fspath(path)))  # noqa: PTH100 -- links stay as they are
        return absolute == self.folder or self.folder in absolute.parents

    def open(self, file: Any, mode: str = "r", buffering: int = -1, *args: Any, **named: Any) -> Any:
        if not set(mode) & set("wax+") or not self.holds(file):
            return _OPEN(file, mode, buffering, *args, **named)
        with self.lock:
            self.meet("open", file)
            raw = _File(os.fspath(file), mode.replace("b", "").replace("t", ""))
            raw.injector = self
            if "a" not in mode:
                self._durable.pop(os.fstat(raw.fileno()).st_ino, None)
            self.wrote(raw.fileno())
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **named)

    def wrote(self, handle: int) -> None:
        self._dirty.add(os.fstat(handle).st_ino)

    def fsync(self, handle: int) -> None:
        """What it makes durable is noted; the disk itself is spared."""
        path = Path(f"/proc/self/fd/{handle}").readlink()
        with self.lock:
            if self.holds(path):
                self.meet("fsync", path)
                found = os.fstat(handle)
                self._dirty.discard(found.st_ino)
                self._durable[found.st_ino] = found.st_size
                self._undo.pop(path, None)

    def move(self, source: Any, target: Any, **named: Any) -> None:
        with self.lock:
            if self.holds(target):
                self.meet("rename", target)
                kept = self._keep(Path(target))
                self._undo.setdefault(Path(target).parent, []).append(lambda: _move_back(source, target, kept))
            _REPLACE(source, target, **named)

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        with self.lock:
            if dir_fd is not None or self.holds(path):
                self.meet("unlink", path)
                kept = None if dir_fd is not None else self._keep(Path(path))
                if kept:
                    self._undo.setdefault(Path(path).parent, []).append(lambda: _REPLACE(kept, path))
            _UNLINK(path, dir_fd=dir_fd)

    def counted(self, call: Callable[..., None], kind: str) -> Callable[..., None]:
        """`call`, which takes a path first, counted."""

        def do(path: Any, *args: Any, **named: Any) -> None:
            with self.lock:
                if named.get("dir_fd") is not None or self.holds(path):
                    self.meet(kind, path)
                call(path, *args, **named)

        return do

    def _keep(self, path: Path) -> Path | None:
        """A second name for a file that is about to lose its own."""
        if not path.is_file():
            return None
        kept = self.folder.parent / f"kept by the disk {self.count}"
        _LINK(path, kept)
        return kept

    def _lose(self) -> None:
        for undos in self._undo.values() if self.fault.endswith("lost") else ():
            for undo in reversed(undos):
                with suppress(OSError):
                    undo()
        for path in self.folder.rglob("*"):
            found = path.stat()
            if path.is_file() and found.st_ino in self._dirty:
                durable = self._durable.get(found.st_ino, 0)
                os.truncate(path, durable + (found.st_size - durable) // 2)


class _File(io.FileIO):
    """Each of its writes is counted."""

    injector: Injector

    def write(self, data: Any) -> int:
        with self.injector.lock:
            half = memoryview(data).cast("B")[: len(data) // 2]
            self.injector.meet("write", self.name, lambda: io.FileIO.write(self, half))
            self.injector.wrote(self.fileno())
            return super().write(data)


def _move_back(source: Any, target: Any, kept: Path | None) -> None:
    _REPLACE(target, source)
    if kept:
        _REPLACE(kept, target)


@contextmanager
def injected(injector: Injector) -> Generator[Injector]:
    """Put the injector between Python and the disk: `open`, `os`, and what is built on them."""
    new: dict[tuple[Any, str], Any] = {
        (io, "open"): injector.open,
        (builtins, "open"): injector.open,
        (os, "fsync"): injector.fsync,
        (os, "replace"): injector.move,
        (os, "rename"): injector.move,
        (os, "unlink"): injector.unlink,
        (os, "remove"): injector.unlink,
        (os, "link"): injector.counted(_LINK, "link"),
        (os, "mkdir"): injector.counted(_MKDIR, "mkdir"),
        (os, "rmdir"): injector.counted(_RMDIR, "rmdir"),
    }
    old = {place: getattr(*place) for place in new}
    try:
        for place, call in new.items():
            setattr(*place, call)
        yield injector
    finally:
        for place, call in old.items():
            setattr(*place, call)


def in_child(work: Callable[[], object]) -> int:
    """Exit code of a forked process that does it: 0, 1 where it raised, -9 where it was killed."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_shares(cases: Sequence[Case], work: Callable[[Case], object]) -> int:
    """Do all cases in as many forked processes as there are cores; how many were done without an error."""
    cores = len(os.sched_getaffinity(0))
    children = []
    for share in range(cores):
        child = os.fork()
        if not child:
            code = 1
            try:
                for case in cases[share::cores]:
                    work(case)
                code = 0
            except BaseException:  # noqa: BLE001 -- told here, counted there
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * cores, "a case failed: see above"
    return len(cases)


def resident() -> float:
    """MB of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
