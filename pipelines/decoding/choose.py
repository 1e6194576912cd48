"""What decodes an episode's reads: the common interface, and the choice between the executors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from pipelines.decoding.dali import DaliExecutor, dali_is_installed
from pipelines.decoding.jpeg import PortableExecutor
from pipelines.decoding.raw import RawExecutor
from pipelines.reads import Reads
from shards_spec import ShardSet
from shards_spec.errors import ConfigError, suggest

if TYPE_CHECKING:
    import torch

EXECUTORS = ("auto", "dali", "portable")
DEVICES = ("cpu", "gpu")


class Executor(Protocol):
    """Decodes windows of stored frames; `decode` may be called from several threads."""

    def decode(self, reads: Reads) -> torch.Tensor:
        """Return uint8 [R, h, w, 3]; ShardError, naming the frame, when one cannot be decoded."""

    def close(self) -> None:
        """Give back threads and memory."""


def create_executor(
    name: str,
    shards: ShardSet,
    *,
    threads: int | None = None,
    device: str = "cpu",
    pin_memory: bool = False,
    codec: str | None = None,
) -> Executor:
    """Make the executor "dali", "portable", or "auto": DALI where it is installed.

    threads: decoding threads (default: one a core). device: where JPEG is decoded, "cpu" or "gpu" (DALI
    only; its hardware decoder differs by a few levels). pin_memory: put frames where a GPU copies them fast.
    codec: of what is read (default: of the frames). Nothing is to be decoded of raw frames: they have one executor,
    whatever name and device are asked for.
    Raises ConfigError for a name or device that does not exist, or for DALI where it is not installed.
    """
    if name not in EXECUTORS:
        raise ConfigError(f'there is no executor "{name}": {suggest(name, EXECUTORS)}')
    if device not in DEVICES:
        raise ConfigError(f'there is no decoding device "{device}": {suggest(device, DEVICES)}')
    if (codec or shards.series("rgb").codec) == "raw":
        return RawExecutor(shards, threads=threads, pin_memory=pin_memory)
    if _takes_dali(name):
        return DaliExecutor(shards, threads=threads, device=device, pin_memory=pin_memory)
    if device == "gpu":
        raise ConfigError('decoding on the gpu needs DALI: pip install "fsar[dali]", or decode on the cpu')
    return PortableExecutor(shards, threads=threads, pin_memory=pin_memory)


def executor_for(
    shards: ShardSet, device: torch.device, *, name: str = "auto", threads: int = 0, series: Sequence[str] = ("rgb",)
) -> Executor:
    """Make the executor that feeds a device: on a GPU, DALI decodes there, and frames are put where it copies fast.

    threads: 0: one a core. series: what is read; the motion of a raw set is JPEG. Raises ConfigError as
    `create_executor` does.
    """
    on_gpu = device.type == "cuda"
    decoding = "gpu" if on_gpu and _takes_dali(name) else "cpu"
    made: dict[str, Executor] = {}
    for each in series:
        codec = shards.series(each).codec
        made[codec] = made.get(codec) or create_executor(
            name, shards, threads=threads or None, device=decoding, pin_memory=on_gpu, codec=codec
        )
    (first, *others) = made.values()
    return ByCodec(shards, made) if others else first


class ByCodec:
    """Hands each read to the executor of its series' codec."""

    def __init__(self, shards: ShardSet, executors: Mapping[str, Executor]) -> None:
        self._shards, self._executors = shards, executors

    def decode(self, reads: Reads) -> torch.Tensor:
        """Return uint8 [R, h, w, 3]."""
        return self._executors[self._shards.series(reads.modality).codec].decode(reads)

    def close(self) -> None:
        """Give back what all of them hold."""
        for executor in self._executors.values():
            executor.close()


def _takes_dali(name: str) -> bool:
    return name == "dali" or (name == "auto" and dali_is_installed())
