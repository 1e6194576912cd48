"""Hold the tensors of one few-shot task."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from einops import rearrange
from torch import Tensor

from shards_spec.errors import ConfigError

PAIRS = (
    ("support", "query"),
    ("support_motion", "query_motion"),
    ("support_features", "query_features"),
)


@dataclass
class Episode:
    """One task: labelled support videos grouped by class, query videos, and what some methods read.

    `support` and `query` may be None if there are features. These replace the trunk, and images
    with them are only the target of a reconstruction. Shapes are checked when the episode is made.

    Raises:
        ConfigError: two tensors do not fit together; the sentence names them.
    """

    support: Tensor | None  # [way, shot, T, 3, H, W] normalised frames; a trunk of clips reads [.., S, clip, 3, H, W]
    query: Tensor | None  # [Q, T, 3, H, W]
    query_labels: Tensor  # [Q] int64 in [0, way)
    class_ids: Tensor  # [way] int64, number in the data set's class table (-1 only outside a data set)
    base_ids: Tensor  # [way] int64, row of the auxiliary classifier; -1: a novel class
    support_mask: Tensor | None = None  # [way, shot] bool on the host; False marks padding of unequal shots
    # [way, shot, T, 2, h, w] displacement of each of T segments of the whole video, in pixels of the stored field, with
    # the camera's motion taken out; 3 colours of stored differences
    support_motion: Tensor | None = None
    query_motion: Tensor | None = None  # [Q, T, 2, h, w]
    support_features: Tensor | None = None  # [way, shot, T, C, h, w] maps, or pooled [way, shot, T, C]
    query_features: Tensor | None = None  # [Q, T, C, h, w] or [Q, T, C]
    class_text: Tensor | None = None  # [way, w]
    unlabelled: Tensor | None = None  # [U, T, 3, H, W]
    unlabelled_features: Tensor | None = None  # [U, T, C, h, w] or [U, T, C]
    unlabelled_motion: Tensor | None = None  # [U, T, 2, h, w]

    def __post_init__(self) -> None:
        self._check_labels()
        if self.support is None and self.support_features is None and self.support_motion is None:
            raise ConfigError("episode: there are no images, features or motion; give support and query of one kind")
        for support, query in PAIRS:
            self._check_pair(support, query)
        self._check_unlabelled("unlabelled", "query")
        self._check_unlabelled("unlabelled_features", "query_features")
        self._check_unlabelled("unlabelled_motion", "query_motion")
        self._check_images()
        self._check_mask()
        if self.class_text is not None and len(self.class_text) != self.way:
            raise ConfigError(
                f"episode: class_text has {len(self.class_text)} rows; give one for each of {self.way} classes"
            )

    def _check_labels(self) -> None:
        for name in ("query_labels", "class_ids", "base_ids"):
            tensor = getattr(self, name)
            if tensor.dtype != torch.int64 or tensor.ndim != 1:
                raise ConfigError(
                    f"episode: {name} is {tensor.dtype} of shape {list(tensor.shape)}; give a vector of int64"
                )
        if len(self.class_ids) != len(self.base_ids):
            raise ConfigError(
                f"episode: {len(self.class_ids)} class_ids and {len(self.base_ids)} base_ids; give one of each a class"
            )
        on_host = self.query_labels.device.type == "cpu"  # reading values elsewhere would wait for the device
        if on_host and bool(((self.query_labels < 0) | (self.query_labels >= self.way)).any()):
            raise ConfigError(
                f"episode: query_labels leave the range 0 to {self.way - 1}; they number the episode's classes"
            )

    def _check_pair(self, support_name: str, query_name: str) -> None:
        support, query = getattr(self, support_name), getattr(self, query_name)
        if support is None and query is None:
            return
        if support is None or query is None:
            raise ConfigError(f"episode: give both {support_name} and {query_name}, or neither")
        shapes = f"{support_name} is {list(support.shape)} and {query_name} {list(query.shape)}"
        if support.ndim < 4 or support.shape[2:] != query.shape[1:]:
            raise ConfigError(f"episode: {shapes}; they must be [way, shot, ...] and [Q, ...] with equal rest")
        if len(support) != self.way or len(query) != len(self.query_labels):
            raise ConfigError(
                f"episode: {shapes}, but there are {self.way} class_ids and {len(self.query_labels)} query_labels"
            )
        if support.shape[:2] != (self.way, self.shot):
            raise ConfigError(f"episode: {support_name} has {support.shape[1]} shots where others have {self.shot}")

    def _check_unlabelled(self, name: str, query_name: str) -> None:
        unlabelled, query = getattr(self, name), getattr(self, query_name)
        if unlabelled is not None and (query is None or unlabelled.shape[1:] != query.shape[1:]):
            raise ConfigError(
                f"episode: {name} is {list(unlabelled.shape)} and {query_name} "
                f"{None if query is None else list(query.shape)}; both must be [number, ...] with equal rest"
            )

    def _check_images(self) -> None:
        if self.support is None:
            return
        if self.support.ndim not in (6, 7) or self.support.shape[-3] != 3:
            raise ConfigError(f"episode: support is {list(self.support.shape)}; it must be [way, shot, T, 3, H, W]")

    def _check_mask(self) -> None:
        mask = self.support_mask
        if mask is None:
            return
        if mask.dtype != torch.bool or mask.device.type != "cpu" or mask.shape != (self.way, self.shot):
            raise ConfigError(
                f"episode: support_mask is {mask.dtype} of shape {list(mask.shape)} on {mask.device}; "
                f"it must be bool of shape {[self.way, self.shot]} on the host"
            )
        if not bool(mask.any(dim=1).all()):
            empty = int(mask.any(dim=1).logical_not().nonzero()[0])
            raise ConfigError(f"episode: support_mask leaves class {empty} without a support video; give at least one")

    @property
    def way(self) -> int:
        """Number of classes."""
        return len(self.class_ids)

    @property
    def shot(self) -> int:
        """Number of support places a class, padding included."""
        kinds = (self.support, self.support_features, self.support_motion)
        return next(support.shape[1] for support in kinds if support is not None)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Episode:
        """Copy the episode to a device; `support_mask` stays on the host."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in values.items()
            if value is not None and name != "support_mask"
        }
        return Episode(**{**values, **moved})

    def real_rows(self) -> Tensor | None:
        """Return the places [S] of real support videos on the host; None without padding."""
        if self.support_mask is None or bool(self.support_mask.all()):
            return None
        return self.support_mask.flatten().nonzero().squeeze(1)  # [S]

    def ungroup(self, grouped: Tensor) -> Tensor:
        """Turn [way, shot, ...] into [S, ...]: the real support videos, class by class."""
        flat = rearrange(grouped, "way shot ... -> (way shot) ...")
        rows = self.real_rows()
        return flat if rows is None else flat[rows.to(flat.device)]

    def group(self, videos: Tensor) -> Tensor:
        """Turn [S, ...] into [way, shot, ...]: the inverse of `ungroup`, with zeros for padding."""
        rows = self.real_rows()
        if rows is not None:
            empty = videos.new_zeros((self.way * self.shot, *videos.shape[1:]))
            videos = empty.index_copy(0, rows.to(videos.device), videos)
        return rearrange(videos, "(way shot) ... -> way shot ...", way=self.way)

    def support_labels(self) -> Tensor:
        """Return the label [S] of each real support video in the episode."""
        labels = torch.arange(self.way, device=self.query_labels.device)[:, None].expand(-1, self.shot)
        return self.ungroup(labels)
