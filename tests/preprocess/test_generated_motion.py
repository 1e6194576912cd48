"""Stored flow of clips whose motion is known, read as motion of episodes, is what geometry says."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from videos import texture, write_video

from fsar import EpisodeLoader, EpisodeRules
from fsar.trunks.motion import grid_means
from pipelines.augment.motion import mirrored
from pipelines.episodes.stream import Chosen
from preprocess.datasets.folder import folder_catalogue
from preprocess.decode import Geometry
from preprocess.stage import Settings, preprocess
from shards_spec import ShardSet

SIDE, FIELD = 256, 128  # of a stored frame, and of its field: a pixel of the field is two of the frame
COUNT, SEGMENTS = 11, 4
LENGTH = (COUNT - 1) / SEGMENTS  # fields of a segment: two and a half
ANGLE, FACTOR = np.deg2rad(2), 1.02
TURN = np.array([[np.cos(ANGLE), -np.sin(ANGLE)], [np.sin(ANGLE), np.cos(ANGLE)]])  # of (x, y), y downwards
STEPS = {  # of one frame: about the centre p becomes step p + shift, in pixels of the frame
    "slide": (np.eye(2), (3.0, -2.0)),
    "turn": (TURN, (0.0, 0.0)),
    "zoom": (FACTOR * np.eye(2), (0.0, 0.0)),
}
CLASSES = ("as-made", "half-rate", "mirrored")
RULES = EpisodeRules(way=1, frames=SEGMENTS, resize=SIDE, crop=SIDE, streams="motion", camera="none", fields=0)
INNER = slice(4, -4)  # cells; nearer the border the texture leaves the picture, and DIS guesses


def moving(step: np.ndarray, shift: tuple[float, float]) -> np.ndarray:
    """[COUNT, SIDE, SIDE, 3]: a texture that fills the picture at all times and moves by a step a frame."""
    sheet, frames = texture(np.random.default_rng(0), 2 * SIDE, 2 * SIDE, cells=(32, 32)), []
    matrix, moved, middle = np.eye(2), np.zeros(2), (SIDE - 1) / 2
    for _ in range(COUNT):
        back = np.linalg.inv(matrix)  # from a place of the frame to one of the sheet
        offset = SIDE - 0.5 - back @ (middle + moved)
        warp = np.column_stack([back, offset])
        frames.append(cv2.warpAffine(sheet, warp, (SIDE, SIDE), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP))
        matrix, moved = step @ matrix, step @ moved + shift
    return np.stack(frames)


def circling(count: int = 33) -> np.ndarray:
    """[count, SIDE, SIDE, 3]: a disc that goes half round on a background that stands still."""
    ground, disc = (texture(np.random.default_rng(seed), SIDE, SIDE, cells=(16, 16)) for seed in (1, 2))
    y, x = np.mgrid[:SIDE, :SIDE]
    frames = []
    for angle in np.linspace(0, np.pi, count):  # seven pixels a frame
        across, down = 70 * np.cos(angle), 70 * np.sin(angle)
        inside = (x - SIDE / 2 - across) ** 2 + (y - SIDE / 2 - down) ** 2 < 35**2
        shifted = cv2.warpAffine(disc, np.array([[1, 0, across], [0, 1, down]]), (SIDE, SIDE))
        frames.append(np.where(inside[..., None], shifted, ground))
    return np.stack(frames)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Clips of a moving texture, as made and mirrored, and an object's path at two frame rates."""
    folder = tmp_path_factory.mktemp("generated")
    for name, (step, shift) in STEPS.items():
        frames = moving(step, shift)
        write_video(folder / "videos" / "as-made" / f"{name}.mp4", frames)
        write_video(folder / "videos" / "mirrored" / f"{name}.mp4", np.ascontiguousarray(frames[:, :, ::-1]))
    frames = circling()
    write_video(folder / "videos" / "as-made" / "path.mp4", frames, fps=24)
    write_video(folder / "videos" / "half-rate" / "path.mp4", frames[::2])
    catalogue = folder_catalogue(folder / "videos", classes={"train": CLASSES})
    settings = Settings(Geometry(SIDE, SIDE), motion=("flow",), workers=1)
    assert preprocess(catalogue, folder / "set", settings) == []
    with ShardSet.open(folder / "set") as opened:
        assert opened.series("flow1").sizes[0].tolist() == [2 * FIELD, FIELD]
        yield opened


def motion_of(shards: ShardSet, names: list[str], rules: EpisodeRules = RULES) -> torch.Tensor:
    """[V, T, 2, 32, 32] of some videos, as the queries of an episode have it."""
    rows = {shards.name(row): row for row in range(shards.num_videos)}
    given = [Chosen((0,), (rows["as-made/path.mp4"],), tuple((rows[f"{name}.mp4"], 0) for name in names))]
    with EpisodeLoader(shards, "train", rules, given=given, executor="portable", threads=1) as loader:
        return next(loader.episodes()).query_motion


@pytest.mark.parametrize("name", STEPS)
def test_motion_of_a_segment_is_the_displacement_that_was_made(shards: ShardSet, name: str) -> None:
    """Within half a pixel everywhere, and a tenth on average, of up to four (found: 0.38 and 0.075 at most)."""
    step, shift = STEPS[name]
    places = (np.arange(32) + 0.5) * FIELD / 32 - FIELD / 2  # of the cells' middles, from the picture's
    across, down = np.meshgrid(places, places)
    of_a_frame = np.tensordot(step - np.eye(2), np.stack([across, down]), axes=1) + np.reshape(shift, (2, 1, 1)) / 2
    (found,) = motion_of(shards, [f"as-made/{name}"]).numpy()
    error = np.abs(found - LENGTH * of_a_frame)[..., INNER, INNER]
    assert error.max() < 0.5
    assert error.mean() < 0.1
    assert np.abs(LENGTH * of_a_frame)[..., INNER, INNER].max() > 2


@pytest.mark.parametrize("name", STEPS)
def test_flow_of_mirrored_frames_is_the_mirrored_flow(shards: ShardSet, name: str) -> None:
    """Within a quarter of a pixel, and a twentieth on average (found: 0.15 and 0.021): DIS looks otherwise at them."""
    one, other = motion_of(shards, [f"as-made/{name}", f"mirrored/{name}"])
    error = (mirrored(one) - other).abs()[..., INNER, INNER]
    assert float(error.max()) < 0.25
    assert float(error.mean()) < 0.05


def test_half_the_frame_rate_gives_the_same_motion(shards: ShardSet) -> None:
    """A cosine of 0.99 is asked for (found: 0.998), and the same length within a tenth."""
    rules = EpisodeRules(way=1, resize=SIDE, crop=SIDE, streams="motion")
    assert (rules.fields, rules.camera, rules.frames) == (4, "median", 8)
    one, half = grid_means(motion_of(shards, ["as-made/path", "half-rate/path"], rules)).flatten(1)
    assert float(torch.nn.functional.cosine_similarity(one, half, dim=0)) > 0.99
    assert float(half.norm()) == pytest.approx(float(one.norm()), rel=0.1)
