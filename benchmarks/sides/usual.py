"""The usual way: what is written today where there are no shards.

Episodes: a torch Dataset whose item is an episode, in a DataLoader with worker processes. decord decodes each clip
from its video file. Preprocessing: ffmpeg into a folder of JPEGs a video, then OpenCV flow on them.
Nothing of this uses the project's own decoding; which videos and which frames is given from outside, so that
both ways do the same work.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.utils.data import DataLoader, Dataset, Sampler

from pipelines.augment.clips import colour_jitter
from pipelines.draw import Jitter
from pipelines.episodes.stream import EpisodePlan
from preprocess.decode import ffmpeg_program
from shards_spec import ShardSet
from shards_spec.errors import ConfigError

OUTPUTS = ("uint8", "float32")
_FLOW_BOUND = 20.0  # pixels; what TSN's files clamp flow to


@dataclass(frozen=True)
class Clip:
    """Reads of the usual way: frames [T] of a video file, the crop's corner on the resized frame."""

    path: str
    frames: tuple[int, ...]
    corner: tuple[int, int]
    jitter: Jitter | None


def clips_of_plan(plan: EpisodePlan, shards: ShardSet, videos: Path) -> list[Clip]:
    """The clips [V] of an episode, support first, by file and source frame: exactly those of the plan.

    Raises:
        ConfigError: a video of the shards is not below `videos`.
    """
    clips = []
    for view in plan.support + plan.query:
        assert not view.flip, "the benchmark's rules flip nothing"
        reads = plan.reads[view.reads]
        first = view.indices[0]
        row = int(reads.rows[first])
        path = videos / shards.name(row)
        if not path.is_file():
            raise ConfigError(f"{path} is missing: give --videos and --shards of the same data set")
        frames = shards.series("rgb").kept(row)[reads.frames[list(view.indices)]]  # [T]
        corner = view.box or (int(reads.tops[first]), int(reads.lefts[first]))
        clips.append(Clip(str(path), tuple(frames.tolist()), corner, view.jitter))
    return clips


def check_decord() -> None:
    """Refuse, in one sentence, where decord is not installed."""
    if importlib.util.find_spec("decord") is None:
        raise ConfigError('the usual way decodes with decord, which is not installed: pip install "fsar[bench]"')


class DecordEpisodes(Dataset[torch.Tensor]):
    """Item n is episode n: uint8 [V, T, crop, crop, 3] or normalised float32 [V, T, 3, crop, crop].

    float32 follows the published loaders: frames at their own size, to float, resized to resize x resize
    (bilinear, no antialiasing), cropped, jittered where asked, normalised. uint8 lets decord resize, which is
    faster (46 clips a core-second against 40 with cv2.resize after it), and stops at the crop. An episode is
    written into shared memory, as the DataLoader's own collation does: sending it costs no copy.
    """

    def __init__(
        self,
        episodes: Sequence[Sequence[Clip]],
        *,
        output: str,
        resize: int = 256,
        crop: int = 224,
        mean: float = 0.45,
        std: float = 0.225,
    ) -> None:
        check_decord()
        if output not in OUTPUTS:
            raise ConfigError(f'there is no output "{output}": give one of {", ".join(OUTPUTS)}')
        self._episodes, self._output = episodes, output
        self._resize, self._crop, self._mean, self._std = resize, crop, mean, std

    def __len__(self) -> int:
        return len(self._episodes)

    def __getitem__(self, n: int) -> torch.Tensor:
        clips, crop = self._episodes[n], self._crop
        sizes = (len(clips), len(clips[0].frames))  # [V, T]
        if self._output == "uint8":
            episode = _shared(*sizes, crop, crop, 3, dtype=torch.uint8)
            for clip, out in zip(clips, episode, strict=True):
                self._uint8_clip(clip, out)
            return episode
        episode = _shared(*sizes, 3, crop, crop, dtype=torch.float32)
        for clip, out in zip(clips, episode, strict=True):
            self._float_clip(clip, out)
        return episode

    def _uint8_clip(self, clip: Clip, out: torch.Tensor) -> None:
        frames = _decode(clip, width=self._resize, height=self._resize)  # [T, resize, resize, 3]
        top, left = clip.corner
        out.copy_(frames[:, top : top + self._crop, left : left + self._crop])

    def _float_clip(self, clip: Clip, out: torch.Tensor) -> None:
        images = rearrange(_decode(clip), "t h w c -> t c h w").float()
        images = F.interpolate(images, (self._resize, self._resize), mode="bilinear", align_corners=False)
        top, left = clip.corner
        out.copy_(images[..., top : top + self._crop, left : left + self._crop])
        if clip.jitter is not None:
            out.copy_(colour_jitter(out[None] / 255, [clip.jitter])[0]).mul_(255)
        out.mul_(1 / (255 * self._std)).sub_(self._mean / self._std)


def _shared(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    tensor.share_memory_()  # type: ignore[no-untyped-call]
    return tensor


def _decode(clip: Clip, **size: int) -> torch.Tensor:
    """uint8 [T, h, w, 3] of a clip's frames."""
    decord = importlib.import_module("decord")
    reader = decord.VideoReader(clip.path, num_threads=1, **size)
    return torch.from_numpy(reader.get_batch(clip.frames).asnumpy())


class FirstEpisodes(Sampler[int]):
    """Numbers 0 to `count` - 1, going round in the data set's `size` episodes; `count` may change between epochs."""

    def __init__(self, size: int, count: int = 0) -> None:
        self.size, self.count = size, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return (number % self.size for number in range(self.count))


def episode_loader(
    dataset: DecordEpisodes, sampler: FirstEpisodes, *, workers: int, pin_memory: bool = False
) -> DataLoader[torch.Tensor]:
    """A DataLoader of whole episodes: persistent workers of one thread each, two episodes ahead each."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=True,
        prefetch_factor=2,
        pin_memory=pin_memory,
        worker_init_fn=_one_thread,
        multiprocessing_context="spawn",  # the parent has threads, which fork does not copy
    )


def _one_thread(_worker: int = 0) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def extract_frames(videos: Sequence[Path], out: Path, *, size: int = 256, workers: int) -> list[Path]:
    """One folder of JPEGs a video, by one ffmpeg process a video, `workers` at a time; returns the folders."""
    folders = [out / f"{number:05d}" for number in range(len(videos))]
    with ThreadPoolExecutor(workers) as pool:  # threads that only wait for their ffmpeg
        list(pool.map(_extract, videos, folders, [size] * len(videos)))
    return folders


def _extract(video: Path, folder: Path, size: int) -> None:
    folder.mkdir(parents=True)
    # one thread: as many processes as cores run, and two of one thread beat one of two. passthrough: each frame once.
    call = [ffmpeg_program(), "-nostdin", "-v", "error", "-threads", "1", "-i", str(video)]
    coding = ["-vf", f"scale={size}:{size}", "-fps_mode", "passthrough", "-q:v", "2"]
    subprocess.run([*call, *coding, str(folder / "%05d.jpg")], check=True)


def flow_pool(workers: int) -> ProcessPoolExecutor:
    """Processes for `extract_flow`, one OpenCV thread each."""
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread)


def extract_flow(folders: Sequence[Path], pool: ProcessPoolExecutor, *, short_side: int = 128) -> None:
    """DIS flow of neighbouring JPEGs, clamped to 20 pixels: two grey JPEGs a pair, next to the frames."""
    in_processes(pool, _flow_of_folder, folders, [short_side] * len(folders))


def in_processes(pool: ProcessPoolExecutor, work: Callable[..., None], *lists: Sequence[Any]) -> None:
    """Call `work` on each place of the lists, and wait for all."""
    for _ in pool.map(work, *lists):
        pass  # what failed is raised here


def _flow_of_folder(folder: Path, short_side: int) -> None:
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    before: npt.NDArray[Any] | None = None
    for number, path in enumerate(sorted(folder.glob("[0-9]*.jpg"))):
        grey = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        assert grey is not None
        factor = short_side / min(grey.shape)
        if factor < 1:
            size = (round(grey.shape[1] * factor), round(grey.shape[0] * factor))
            grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
        if before is not None:
            field = dis.calc(before, grey, None)  # [h, w, 2] pixels
            code = np.rint((field / _FLOW_BOUND).clip(-1, 1) * 127.5 + 127.5).astype(np.uint8)
            for axis, name in enumerate("xy"):
                cv2.imwrite(str(folder / f"flow_{name}_{number:05d}.jpg"), code[..., axis])
        before = grey
