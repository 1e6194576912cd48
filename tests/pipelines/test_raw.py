"""Raw sets: frames stored as bytes, read out of the shard files without decoding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from click.testing import CliRunner
from folders import command_line, decode, digests, flip_bit
from hypothesis import given
from hypothesis import strategies as st
from second_reader import second_reader
from videos import moving_frames, write_video

from fsar import EpisodeLoader
from fsar.report.pictures import middle_frame
from pipelines.augment.on_cpu import ClipBuffers
from pipelines.decoding.raw import RawExecutor
from pipelines.episodes.clip_views import View
from pipelines.episodes.rules import EpisodeRules
from pipelines.episodes.stream import Chosen
from pipelines.loader import create_executor
from pipelines.reads import Reads
from preprocess.datasets.folder import folder_catalogue
from preprocess.decode import Geometry, Planes, to_rgb
from preprocess.stage import Settings, preprocess
from shards_spec import ShardError, ShardSet
from shards_spec.cli.shards import cli
from shards_spec.index.build import build_index
from shards_spec.verify import verify

SIZES = [(72, 96), (96, 72), (72, 72)]  # of the videos; stored with a short side of 48


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for label in "ab":
        for n, size in enumerate(SIZES):
            write_video(folder / label / f"{n}.mp4", moving_frames(n, 9 + n, size=size))
    return folder


def store(videos: Path, out: Path, codec: str, **settings) -> Path:
    catalogue = folder_catalogue(videos, classes={"train": ["a", "b"]})
    assert (
        preprocess(catalogue, out, Settings(Geometry(short=48), codec=codec, **{"rows_per_shard": 4} | settings)) == []
    )
    return out


@pytest.fixture(scope="module")
def raw_path(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store(videos, tmp_path_factory.mktemp("raw") / "shards", "raw")


@pytest.fixture(scope="module")
def raw(raw_path: Path) -> ShardSet:
    with ShardSet.open(raw_path) as shards:
        yield shards


def stored_frames(path: Path) -> dict[int, np.ndarray]:
    """Row -> frames [n, h, w, 3], by the reader that knows nothing but SPEC.md."""
    found = {}
    for tar in sorted(path.glob("rgb-*.tar")):
        for key, files in second_reader(tar):
            info = json.loads(files["json"])
            assert info["codec"] == "raw"
            members = [np.frombuffer(data, np.uint8) for name, data in files.items() if name.endswith(".raw")]
            found[int(key[1:])] = np.stack(members).reshape(info["frames"], *info["size"], 3)
    return found


def test_frames_are_those_of_the_jpeg_set_without_its_loss(videos: Path, raw: ShardSet, tmp_path: Path) -> None:
    with ShardSet.open(store(videos, tmp_path / "jpeg", "jpeg")) as jpeg:
        frames = stored_frames(raw.path)
        assert len(frames) == raw.num_videos == 6
        for row, video in frames.items():
            assert np.array_equal(raw.series("rgb").pixels(row), video)
            for frame, payload in zip(video, jpeg.series("rgb").read(row, range(len(video))), strict=True):
                assert np.abs(decode(payload).astype(int) - frame).mean() < 4  # sharp 4:2:0 colours at quality 90
        for series in ("diff1", "flow1"):
            assert jpeg.series(series).sha256 == raw.series(series).sha256
        rules = EpisodeRules(way=2, frames=4, resize=48, crop=40, random_frames=True, random_crop=True, streams="both")
        episodes = []
        for shards in (raw, jpeg):
            with EpisodeLoader(shards, "train", rules, executor="portable") as loader:
                episodes.append(next(loader.episodes()))
        one, other = episodes
        assert one.query_motion.any()
        assert torch.equal(one.support_motion, other.support_motion)
        assert torch.equal(one.query_motion, other.query_motion)
        assert 0 < (one.query - other.query).abs().mean() < 4 / 255 / 0.225  # the loss of the frames above


@pytest.mark.parametrize("size", [(48, 64), (47, 33), (33, 48)])
def test_colours_are_those_that_libjpeg_makes_of_the_planes(size: tuple[int, int]) -> None:
    frame = moving_frames(1, 1, size=(96, 96))[0]
    half = (-(-size[0] // 2), -(-size[1] // 2))
    parts = (frame[: size[0], : size[1], 0], frame[: half[0], : half[1], 1], frame[: half[0], : half[1], 2])
    planes = Planes(*(np.ascontiguousarray(part) for part in parts))
    nearly_exact = simplejpeg.encode_jpeg_yuv_planes(*planes, quality=100, fastdct=False)
    difference = decode(nearly_exact).astype(int) - to_rgb(planes)
    assert difference.shape == (*size, 3)
    assert np.abs(difference).mean() < 0.6
    assert np.abs(difference.mean((0, 1))).max() < 0.1


def test_same_bytes_however_made(videos: Path, raw_path: Path, tmp_path: Path) -> None:
    again = store(videos, tmp_path / "again", "raw", motion=(), workers=2)
    store(videos, again, "raw")  # motion added later
    assert digests(again) == digests(raw_path)
    for path in (*again.glob("*.idx"), *again.glob("*-0*.json")):
        path.unlink()
    build_index(again)
    assert digests(again) == digests(raw_path)


def test_another_codec_is_refused(videos: Path, raw_path: Path) -> None:
    with pytest.raises(ShardError, match=r"rgb\.codec is 'raw', asked for 'jpeg'"):
        store(videos, raw_path, "jpeg")
    done = command_line("folder", "--videos", videos, "--out", raw_path, "--profile", "short256", "--size", "48")
    assert done.returncode == 2
    assert "rgb.codec is 'raw', asked for 'jpeg'" in done.stderr


@given(data=st.data())
def test_windows_are_those_of_the_stored_frames(raw: ShardSet, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    rows = np.sort(data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count)))
    room = raw.series("rgb").sizes[rows]  # [R, 2]
    size = tuple(data.draw(st.integers(1, int(side))) for side in room.min(0))
    frames, tops, lefts = (
        np.array([data.draw(st.integers(0, int(most))) for most in limits])
        for limits in (raw.frames[rows] - 1, *(room - size).T)
    )
    executor = create_executor("portable", raw, threads=2)
    found = executor.decode(Reads("rgb", rows, frames, tops, lefts, size)).numpy()
    executor.close()
    for i, (row, frame, top, left) in enumerate(zip(rows, frames, tops, lefts, strict=True)):
        whole = np.frombuffer(raw.series("rgb").read(row, [frame])[0], np.uint8).reshape(*room[i], 3)
        assert np.array_equal(found[i], whole[top : top + size[0], left : left + size[1]])


@pytest.mark.parametrize("name", ["auto", "dali", "portable"])
def test_every_name_gives_the_raw_executor(raw: ShardSet, name: str) -> None:
    executor = create_executor(name, raw, device="gpu")
    assert isinstance(executor, RawExecutor)
    executor.close()


def test_shares_of_threads_are_put_together(raw: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.arange(6)
    reads = Reads("rgb", rows, rows, rows, rows[::-1], (40, 40))
    one, three = RawExecutor(raw, threads=1), RawExecutor(raw, threads=3)
    expected = one.decode(reads)
    monkeypatch.setattr("pipelines.decoding.raw.LEAST_SHARE", 1)
    assert torch.equal(three.decode(reads), expected)
    with pytest.raises(ShardError, match="frame 90 of video"):
        three.decode(Reads("rgb", rows, np.full(6, 90), rows, rows, (40, 40)))
    one.close()
    three.close()


@pytest.mark.parametrize("changed", [{}, {"query_flip": True}, {"query_jitter": True}])
@pytest.mark.parametrize("threads", [1, 3])
def test_clips_straight_from_the_files_are_the_rendered_frames(
    raw_path: Path, changed: dict[str, bool], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.augment.on_cpu.LEAST_SHARE", 1)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    rules = EpisodeRules(way=2, frames=4, resize=48, crop=40, random_frames=True, random_crop=True, **changed)
    given = [Chosen((0, 1), (2, 5), ((5, 1), (2, 0)))] * 4  # the videos that are stored as squares: nothing is resized
    look = {"mean": (0.1, 0.4, 0.7), "std": (0.2, 0.3, 0.25)}
    with ShardSet.open(raw_path) as raw, EpisodeLoader(raw, "train", rules, given=given, **look) as loader:
        decoded = loader.background.frames(loader.stream, 0, 4)
        for (plan, frames, _), episode in zip(decoded, loader.episodes(0, 4), strict=True):
            clips = torch.cat([episode.support.flatten(0, 1), episode.query])
            expected = [normalised(frames[view.reads], view, **look) for view in plan.views]
            if not changed.get("query_jitter"):
                assert torch.equal(clips, torch.stack(expected))
            assert torch.equal(clips[:2], torch.stack(expected[:2]))  # support is never jittered


def normalised(frames: torch.Tensor, view: View, *, mean: tuple, std: tuple) -> torch.Tensor:
    """A clip as the formula has it, operation by operation: [T, 3, h, w]."""
    clip = frames[list(view.indices)].permute(0, 3, 1, 2).float()
    means, stds = (torch.tensor(three)[:, None, None] for three in (mean, std))
    return (clip.flip(-1) if view.flip else clip) * (1 / (255 * stds)) + -means / stds


def test_episodes_of_mixed_sizes(raw: ShardSet) -> None:
    rules = EpisodeRules(way=2, queries=1, frames=4, resize=48, crop=40, random_frames=True, random_crop=True)
    with EpisodeLoader(raw, "train", rules) as loader:
        held = list(loader.episodes(0, 12))  # more than there are buffers
        for kept, episode in zip(held, loader.episodes(0, 12), strict=True):
            assert torch.equal(kept.query, episode.query)
        ((plan, pixels, _),) = loader.background.frames(loader.stream, 5, 6)
    for reads, frames in zip(plan.reads, pixels, strict=True):
        for i, row in enumerate(reads.rows.tolist()):
            whole = raw.series("rgb").pixels(row)[reads.frames[i]]
            window = whole[reads.tops[i] :, reads.lefts[i] :][: reads.size[0], : reads.size[1]]
            assert np.array_equal(frames[i].numpy(), window)


@pytest.mark.parametrize(
    ("frame", "top", "size", "words"),
    [(9, 0, (8, 8), "not 9"), (-1, 0, (8, 8), "not -1"), (0, 41, (8, 8), "window"), (0, -1, (1, 1), "window"),
     (0, 0, (49, 8), "window")],
)  # fmt: skip
def test_nothing_outside_a_frame_is_read(
    raw: ShardSet, frame: int, top: int, size: tuple[int, int], words: str
) -> None:
    executor = create_executor("auto", raw)
    one = np.zeros(1, dtype=np.int64)
    with pytest.raises(ShardError, match=words):
        executor.decode(Reads("rgb", one, one + frame, one + top, one, size))
    executor.close()


def test_a_frame_of_another_size_than_the_index_has_is_refused(raw_path: Path) -> None:
    with ShardSet.open(raw_path) as shards:
        rgb = shards.series("rgb")
        rgb.sizes[2] = (48, 50)
        with pytest.raises(ShardError, match="members of video 2 are no raw 48x50"):
            rgb.pixels(2)
        with pytest.raises(ShardError, match="diff1 members of video 0 are no raw"):
            shards.series("diff1").pixels(0)


def test_cut_and_swapped_shards_are_refused(raw_path: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(raw_path, tmp_path / "copy")
    first, second = copy / "rgb-000000.tar", copy / "rgb-000001.tar"
    with ShardSet.open(copy) as shards:
        before = shards.series("rgb").pixels(0)[0].copy()
        with first.open("r+b") as file:
            file.truncate(first.stat().st_size - 512)
        with pytest.raises(ShardError, match="cut short or replaced while it was open"):
            shards.series("rgb").pixels(0)
    with pytest.raises(ShardError, match="cut short or replaced"):
        ShardSet.open(copy)
    shutil.copy(raw_path / second.name, first)
    with pytest.raises(ShardError, match="cut short or replaced"):
        ShardSet.open(copy)
    assert before.shape[2] == 3


def test_commands_work_on_a_raw_set(raw_path: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(raw_path, tmp_path / "copy")
    for words in (["info"], ["verify"], ["reindex"], ["peek", "--out", str(tmp_path / "sheet.png")]):
        done = CliRunner().invoke(cli, [words[0], str(copy), *words[1:]], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert words != ["info"] or "3 sizes raw" in done.output
    assert digests(copy) == digests(raw_path)
    flip_bit(copy / "rgb-000001.tar", 8 * 20_000)
    (fault,) = verify(copy)
    assert "rgb-000001.tar: c00000004.00002.raw: content damaged" in fault


def test_webdataset_hands_the_bytes_over(raw: ShardSet) -> None:
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in sorted(raw.path.glob("rgb-*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8"))
    assert [sample["json"]["name"] for sample in samples] == [raw.name(row) for row in range(6)]
    assert samples[1]["00003.raw"] == raw.series("rgb").pixels(1)[3].tobytes()


def test_buffers_are_given_again_only_when_nobody_holds_them() -> None:
    buffers = ClipBuffers(np.uint8)
    first = buffers.take(10, 3)
    view, address = first[2], first.data_ptr()
    del first
    assert buffers.take(10, 3).data_ptr() != address
    del view
    assert buffers.take(8, 3).data_ptr() == address  # a smaller one fits too


def test_pictures_of_reports_are_checked_too(raw_path: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "set"
    shutil.copytree(raw_path, damaged)
    with ShardSet.open(damaged, check=True) as shards:
        series, row = shards.series("rgb"), 1
        middle = len(series.kept(row)) // 2
        frame = middle_frame(shards, row)
        assert np.array_equal(frame, stored_frames(damaged)[row][middle])
        (data,) = series.read(row, [middle])
    tar = next(path for path in sorted(damaged.glob("rgb-*.tar")) if data in path.read_bytes())
    flip_bit(tar, 8 * tar.read_bytes().index(data) + 3)
    with ShardSet.open(damaged) as shards:
        assert (middle_frame(shards, row) != frame).sum() == 1
    with ShardSet.open(damaged, check=True) as shards, pytest.raises(ShardError, match="content damaged"):
        middle_frame(shards, row)
