"""Let several processes compute one run together, and exchange values.

A single process needs no group: these functions then cost nothing and change nothing.  In a group
every process makes the same calls in the same order, on the device where it computes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from shards_spec.errors import FsarError

T = TypeVar("T")

# The longest that a process waits for another one; torchrun itself ends all of them at once when
# one dies.
PATIENCE = timedelta(minutes=10)


class LostProcessError(FsarError):
    """Another process of the run has ended, or does not answer."""


def count() -> int:
    """Count the processes of the run."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Tell whether this is the process that writes files."""
    return rank() == 0


def local_rank() -> int:
    """Number of this process among those on its machine, as torchrun says."""
    return int(os.environ.get("LOCAL_RANK", "0")) if count() > 1 else 0


def threads(asked: int) -> int:
    """Choose the number of decoding threads.

    It is as asked; 0 stays 0 for a single process, and is this process's share of the cores in a
    group.
    """
    if asked or count() == 1:
        return asked
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def join() -> Store:
    """Form the group that torchrun's environment describes: gloo on CPUs, and NCCL on GPUs.

    Returns the store that the processes share.

    Raises:
        FsarError: they do not find each other.
    """
    try:
        store, number, size = next(rendezvous("env://", timeout=PATIENCE))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, store=store, rank=number, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FsarError(
            f"the processes of this run did not find each other ({reason}); start them by torchrun"
        ) from error
    return cast("Store", store)


def leave() -> None:
    """End the group."""
    distributed.destroy_process_group()


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(
            "another process of this run has ended or does not answer: what it said stands above, unless it was killed"
        ) from error


@torch.no_grad()
def gather(values: Tensor) -> Tensor:
    """Gather tensors [N, ...] of all processes as [processes * N, ...], in their order.

    The result has no gradient.
    """
    if count() == 1:
        return values.detach()
    parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(count())]
    with _lost():
        distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def gather_values(value: T) -> list[T]:
    """Gather one value of each process, of any kind that pickle knows."""
    if count() == 1:
        return [value]
    values: list[T | None] = [None] * count()
    with _lost():
        distributed.all_gather_object(values, value)
    return cast("list[T]", values)


@torch.no_grad()
def add_up(tensors: Sequence[Tensor]) -> None:
    """Make each tensor the sum over all processes, in one message.

    Equal bit for bit in all of them.
    """
    if count() == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    with _lost():
        distributed.all_reduce(flat)
    for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))


def anywhere(flags: Tensor) -> Tensor:
    """Combine flags [...]: each is set if it is set in any process."""
    if count() == 1:
        return flags
    numbers = flags.to(torch.int32)
    with _lost():
        distributed.all_reduce(numbers, distributed.ReduceOp.MAX)
    return numbers > 0


def of_first(value: T) -> T:
    """Return the value that the first process has."""
    if count() == 1:
        return value
    values = [value]
    with _lost():
        distributed.broadcast_object_list(values, src=0)
    return values[0]


@torch.no_grad()
def like_first(tensor: Tensor) -> Tensor:
    """Overwrite a tensor by that of the first process, and return it."""
    if count() > 1:
        held = tensor.detach().contiguous()
        with _lost():
            distributed.broadcast(held, src=0)
        tensor.copy_(held)
    return tensor


def same_weights(module: nn.Module) -> None:
    """Overwrite the parameters and buffers of a module by those of the first process."""
    if count() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            like_first(tensor)


def wait_for_all() -> None:
    """Wait until every process has come this far."""
    if count() > 1:
        add_up([torch.zeros(1)])


def share(number: int) -> range:
    """Give this process its part of `number` things; parts differ by at most one."""
    return range(number * rank() // count(), number * (rank() + 1) // count())
