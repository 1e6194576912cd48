"""Episodes a second of training: through the trunk, and behind a frozen one whose features are read from disk.

    python -m benchmarks.frozen [--device cuda]

Both are forward and backward of the same model, `TrainingStep`, on episodes of noise.  The usual side's episode lies in
memory, so that it pays for no decoding. The cached one reads its features from mapped files, one episode after the
other; a loader does so in the background.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.measure.bounds import synchronise
from benchmarks.measure.environment import load_average, write_result
from benchmarks.measure.timing import Contestant, markdown_table, time_in_turn
from benchmarks.sides.step_side import Sizes, make_episode
from fsar.episode import Episode
from fsar.evaluation.store import Found, Group, Values, fill
from fsar.methods import METHODS, FewShotMethod, create_method, method_options
from fsar.training.frozen import IN_A_PART, TYPES, freeze_trunk
from fsar.training.step import TrainingStep
from shards_spec.errors import ConfigError

VIEWS = 96  # in the store; each episode draws some of them
CACHED = 4  # episodes behind the frozen trunk for each one through it


@dataclass(frozen=True)
class Setting:
    """A trunk and the episodes that it sees."""

    trunk: str
    sizes: Sizes
    device: torch.device


def make_model(method: str, setting: Setting) -> FewShotMethod:
    """A method with random weights, in training mode."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"trunk": setting.trunk, "num_classes": 64, "frames": setting.sizes.frames}
    known = method_options(method)
    model = create_method(method, **{key: value for key, value in options.items() if key in known})
    return model.train().to(setting.device)


def learning_methods(setting: Setting) -> list[str]:
    """The methods that have something to train after the trunk."""
    names = []
    for name in METHODS:
        try:
            freeze_trunk(make_model(name, setting), name)
        except ConfigError:
            continue
        names.append(name)
    return names


class Usual:
    """Steps through the trunk."""

    def __init__(self, method: str, setting: Setting) -> None:
        self.setting, self.episode = setting, make_episode(setting.sizes).to(setting.device)
        self.step = TrainingStep(make_model(method, setting))

    def run(self, count: int) -> None:
        """That many episodes."""
        for _ in range(count):
            self.step(self.episode, seed=0)
        synchronise(self.setting.device)


class Cached:
    """Steps behind the frozen trunk, features read for each."""

    def __init__(self, method: str, setting: Setting, folder: Path) -> None:
        self.setting, model = setting, make_model(method, setting)
        freeze_trunk(model, method)
        self.step = TrainingStep(model)
        self.store = noise_store(model, setting, folder)
        self.images = make_episode(setting.sizes)
        self.generator = np.random.default_rng(0)

    def run(self, count: int) -> None:
        """That many episodes."""
        for _ in range(count):
            self.step(self.draw(), seed=0)
        synchronise(self.setting.device)

    def draw(self) -> Episode:
        """An episode of views that are drawn anew."""
        sizes, device = self.setting.sizes, self.setting.device
        places = self.generator.choice(VIEWS, sizes.way + sizes.queries, replace=False)
        read = {kind: values.to(device).float() for kind, values in self.store.read(places).items()}
        support, query = ({kind: v[part] for kind, v in read.items()} for part in self._parts())
        given: dict[str, Any] = {name: getattr(self.images, name) for name in ("query_labels", "class_ids", "base_ids")}
        given |= {"support": None, "query": None}
        if "images" in read:
            given |= {"support": support["images"][:, None], "query": query["images"]}
        features = "maps" if "maps" in read else "pooled"
        given |= {"support_features": support[features][:, None], "query_features": query[features]}
        return Episode(**given).to(device)

    def _parts(self) -> tuple[slice, slice]:
        return slice(0, self.setting.sizes.way), slice(self.setting.sizes.way, None)


def noise_store(model: FewShotMethod, setting: Setting, folder: Path) -> Found:
    """Noise in the shape of the features that a method reads."""
    assert model.trunk is not None
    sizes = setting.sizes
    with torch.no_grad():
        maps = model.trunk(torch.zeros(1, 1, 3, sizes.size, sizes.size, device=setting.device)).maps
    shapes = {"pooled": (model.channels,), "maps": tuple(maps.shape[2:]), "images": (3, sizes.size, sizes.size)}
    kinds = ["maps" if "maps" in model.reads else "pooled", *(["images"] if "images" in model.reads else [])]

    def make(numbers: NDArray[np.int64]) -> Iterator[Values]:
        for _ in range(0, len(numbers), 8):
            yield {kind: torch.rand(8, sizes.frames, *shapes[kind]).to(TYPES[kind]) for kind in kinds}

    group, size = Group(folder, {"kinds": kinds}, verify=False), IN_A_PART[kinds[0]]
    return fill(group, np.arange(VIEWS), make, size=size, batch=8, unit="view", hint="name another $TMPDIR")


def measure(setting: Setting, methods: list[str], *, rounds: int) -> list[dict[str, Any]]:
    """One row a method."""
    rows = []
    for method in methods:
        with tempfile.TemporaryDirectory() as folder:
            usual, cached = Usual(method, setting), Cached(method, setting, Path(folder) / "features")
            contestants = [Contestant("usual", usual.run), Contestant("cached", cached.run)]
            for contestant in contestants:
                contestant.run(1)
            timings = time_in_turn(contestants, rounds=rounds, counts=[1, CACHED])
        rates = {name: round(timing.rate, 2) for name, timing in timings.items()}
        ratio = round(timings["cached"].rate / timings["usual"].rate, 1)
        rows.append({"trunk": setting.trunk, "method": method, "ratio": ratio} | rates)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = ["trunk", "method", "through the trunk", "cached features", "ratio"]
    lines = [
        [row["trunk"], row["method"], f"{row['usual']:.2f}/s", f"{row['cached']:.1f}/s", f"{row['ratio']:.1f}"]
        for row in rows
    ]
    return markdown_table(head, lines)


@click.command()
@click.option("--device", default="cpu", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=1, show_default=True)
@click.option("--methods", "names", help="Commas between them.  [default: all that train anything after the trunk]")
@click.option("--trunks", default="tiny,resnet50", show_default=True, help="Names, commas between them.")
@click.option("--save/--no-save", default=True, show_default=True, help="Write the result's file.")
def main(device: str, rounds: int, names: str | None, trunks: str, *, save: bool) -> None:
    """Time both sides in turn, method by method; print and store a table."""
    place, before = torch.device(device), load_average()
    small = place.type == "cpu"
    episode = partial(Sizes, way=2 if small else 5, queries=3 if small else 30)
    rows = []
    for trunk in trunks.split(","):
        sizes = episode(size=64 if trunk == "tiny" else 224)
        setting = Setting(trunk, sizes, place)
        rows += measure(setting, names.split(",") if names else learning_methods(setting), rounds=rounds)
    click.echo(table(rows))
    context = {"device": device, "threads": torch.get_num_threads(), "rounds": rounds, "load_average_before": before}
    context |= {"way": episode().way, "queries": episode().queries}
    if save:
        click.echo(f"written: {write_result(f'frozen-{place.type}', rows, context=context)}")


if __name__ == "__main__":
    main()
