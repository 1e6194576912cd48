"""Capture a training step once as a CUDA graph, and replay it for episodes of the same shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor
from tqdm import tqdm

from fsar.episode import Episode
from shards_spec.errors import ConfigError

WARM_UPS = 3  # on their first runs libraries choose kernels and allocate, which a capture does not allow

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def tensors_of(episode: Episode) -> dict[str, Tensor]:
    """Return the tensors of an episode by name."""
    values = {field.name: getattr(episode, field.name) for field in fields(episode)}
    return {name: value for name, value in values.items() if value is not None}


def shapes_of(episode: Episode) -> Shapes | None:
    """Return the shapes that a graph is made for; None for masked shots.

    The padding of masked shots is removed by a list of indices that differs each time.
    """
    if episode.support_mask is not None:
        return None
    return {name: (tuple(value.shape), value.dtype) for name, value in tensors_of(episode).items()}


class Graphed:
    """A step that replays a CUDA graph for episodes of one shape, and runs all others without it.

    The first episode runs without the graph and makes the tensors that the others add to.  The
    second episode warms the step up and captures it on a stream of its own.  Parameters,
    statistics, gradients and the random state are afterwards what they were.  From then on an
    episode is a copy into fixed buffers and a replay.  The graph keeps the memory of its inner
    values between replays.

    Args:
        run: The step; it must not wait for the device.
        state: Returns the tensors that the step changes.
        device: A CUDA device.
    """

    def __init__(self, run: Callable[[Episode], None], state: Callable[[], list[Tensor]], device: torch.device) -> None:
        self._run, self._state, self._device = run, state, device
        self._started = self._said = False
        self._shapes: Shapes | None = None
        self._episode: Episode | None = None  # the fixed buffers that the graph reads
        # The tensors that the graph changes.  It knows their addresses only, so their memory must
        # never be freed.
        self._held: list[Tensor] = []
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, episode: Episode) -> None:
        """Run one episode.

        Raises:
            ConfigError: the model cannot be captured.
        """
        shapes = shapes_of(episode)
        if not self._started or shapes is None or (self._shapes is not None and shapes != self._shapes):
            self._say_why(shapes)
            self._started |= shapes is not None
            self._run(episode)
            return
        if self._graph is None or self._episode is None:
            self._episode, self._shapes = copy_of(episode), shapes
            self._graph = self._capture(self._episode)
        # A graph reads and writes fixed addresses: the new values must lie where the captured ones
        # lay.
        for name, buffer in tensors_of(self._episode).items():
            buffer.copy_(getattr(episode, name), non_blocking=True)
        self._graph.replay()

    def _say_why(self, shapes: Shapes | None) -> None:
        if self._said or (shapes is not None and self._shapes is None):
            return
        self._said = True
        why = "shots are masked" if shapes is None else "shapes differ from those of the CUDA graph"
        tqdm.write(f"episodes whose {why} run without the graph, which is slower")

    def _capture(self, episode: Episode) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._held = self._state()
        before = [tensor.clone() for tensor in self._held]  # warm-ups are real steps, to be undone
        try:
            with torch.random.fork_rng([self._device]):
                stream.wait_stream(torch.cuda.current_stream(self._device))
                with torch.cuda.stream(stream):
                    for _ in range(WARM_UPS):
                        self._run(episode)
                torch.cuda.current_stream(self._device).wait_stream(stream)
                # The threads that load episodes go on meanwhile; in another mode their work would
                # end the capture.
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    self._run(episode)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"this model cannot be captured as a CUDA graph ({reason}); add --graph false") from error
        for tensor, old in zip(self._held, before, strict=True):
            tensor.copy_(old)
        return graph


def copy_of(episode: Episode) -> Episode:
    """Copy an episode into memory of its own."""
    return replace(episode, **{name: value.clone() for name, value in tensors_of(episode).items()})
