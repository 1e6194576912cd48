"""Measure the cost of an evaluation: the trunk in every episode, or each video embedded once.

    python -m benchmarks.evaluate [--videos VIDEOS] [--method molo]

* embedding: stored videos through the loader and ResNet-50, and ResNet-50 by itself on as many clips in memory;
* usual: the trunk on every clip of every episode, scaled from its rate, without decoding and matching;
* matching as a whole, from embeddings: videos are chosen, gathered and matched, and the answers noted. It runs in
  batches, or, where a method allows it, from a table of all pairs of the test videos. `fsar-eval` takes the table
  where it needs fewer pairs than the episodes have;
* one episode after the other, each planned with its frames.

The matched embeddings are random numbers of the shapes that ResNet-50 gives: their values do not change the work.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from benchmarks.episodes import make_shards
from benchmarks.measure.bounds import gflop, matmul_rate, synchronise
from benchmarks.measure.environment import load_average, write_result
from benchmarks.measure.timing import Contestant, markdown_table, time_in_turn
from benchmarks.sides.clips import make_clips
from benchmarks.sides.synthetic_index import PER_CLASS, make_set
from fsar import EpisodeLoader
from fsar.evaluation.embeddings import embed_rows
from fsar.evaluation.logits import EpisodeVideos, Matching, by_pairs, table_pays
from fsar.methods import METHODS, Embedding, FewShotMethod, create_method
from fsar.trunks import Features
from pipelines.episodes.rules import EpisodeRules
from pipelines.episodes.stream import EpisodeStream
from shards_spec import ShardSet
from shards_spec.cli.console import run_command
from shards_spec.index.build import build_index

ROUNDS = 2
SHOTS = (1, 5)
CHANNELS = {"clip-fsar": 1024}  # what CLIP's ResNet-50 pools to
AT_ONCE = 200  # episodes that are chosen before they are matched
BATCH = 8  # clips that go through the trunk together
VIDEOS = 8  # that are embedded


class Matched:
    """A method, random embeddings of many videos, and episodes of these."""

    def __init__(self, name: str, shards: ShardSet, rules: EpisodeRules, device: torch.device) -> None:
        torch.manual_seed(0)
        self.rules, self.device = rules, device
        self.stream = EpisodeStream(shards, "all", rules, seed=0)
        self.videos = self.stream.videos()
        channels = CHANNELS.get(name, 2048)
        self.model = create_method(name, trunk=None, channels=channels, frames=rules.frames).eval().to(device)
        self.embedding = random_embedding(self.model, len(self.videos), rules.frames, device)
        text = torch.randn(len(shards.dataset.classes), channels, device=device)
        texts = (lambda classes: text[classes.to(device)]) if "class_text" in self.model.reads else None
        self.matching = Matching(self.model, self.embedding, texts, "fp32")

    def chosen(self, start: int, stop: int) -> EpisodeVideos:
        """Episodes start to stop, as places in the embedding."""
        return EpisodeVideos.of([self.stream.choose(n) for n in range(start, stop)]).within(self.videos)

    def in_batches(self, episodes: int) -> Iterator[int]:
        """Episodes that are done, after each part of them."""
        for start in range(0, episodes, AT_ONCE):
            part = self.chosen(start, min(start + AT_ONCE, episodes))
            for logits in self.matching.in_batches(part):
                note(logits)
                yield len(logits)

    def from_table(self, episodes: int) -> Iterator[int]:
        """Match from a table of all pairs."""
        for logits in self.matching.from_table(self.chosen(0, episodes)):
            note(logits)
            yield len(logits)

    def one_by_one(self, episodes: int) -> Iterator[int]:
        """Plan every episode whole as well."""
        for n in range(episodes):
            plan = self.stream.plan(n)
            support, query = (np.searchsorted(self.videos, rows) for rows in (plan.support_rows, plan.query_rows))
            support = support.reshape(plan.way, plan.shot)
            texts = self.matching.texts
            with torch.no_grad():
                logits = self.model.match(
                    self.picked(support),
                    self.picked(query),
                    class_text=None if texts is None else texts(torch.from_numpy(plan.class_ids)),
                )
            note(logits[None])
            yield 1

    def picked(self, places: Any) -> Embedding:  # noqa: ANN401 -- an array
        """The embedding of videos at places [...]."""
        index = torch.from_numpy(places).to(self.device)
        return self.embedding.map(lambda tensor: tensor[index])


def note(logits: Tensor) -> object:
    """The answers [B, Q] on the host."""
    return logits.argmax(dim=2).cpu().numpy()


def random_embedding(model: FewShotMethod, videos: int, frames: int, device: torch.device) -> Embedding:
    """Embed random features by a method; for MoLo, which needs maps, random tokens."""
    shape = (videos, frames, model.channels)
    if hasattr(model, "motion"):
        return Embedding(torch.rand(shape, device=device), torch.rand(videos, frames - 1, shape[2], device=device))
    with torch.no_grad():
        features = torch.rand(shape, device=device).split(64)
        return Embedding(torch.cat([model.embed(Features(None, part)).tokens for part in features]))


def rate_of(work: Callable[[int], Iterator[int]], episodes: int, *, seconds: float) -> float:
    """Episodes a second of so many episodes, or of those that `seconds` suffice for; a few go before, unmeasured."""
    for _ in zip(range(3), work(min(episodes, 24)), strict=False):
        pass
    done, began = 0, time.perf_counter()
    for count in work(episodes):
        done += count
        if time.perf_counter() - began > seconds:
            break
    return done / (time.perf_counter() - began)


def measure(matched: Matched, *, episodes: int, seconds: float) -> dict[str, Any]:
    """One row: rates of the ways of matching, and the work of one episode."""
    one = matched.chosen(0, 1)
    rates = {
        "batched": rate_of(matched.in_batches, episodes, seconds=seconds),
        "one_by_one": rate_of(matched.one_by_one, episodes, seconds=seconds / 2),
    }
    if by_pairs(matched.model, matched.rules.shot):
        began = time.perf_counter()
        done = sum(matched.from_table(episodes))  # whole: what is looked up was computed before
        rates["table"] = done / (time.perf_counter() - began)
    taken = "table" if table_pays(matched.model, matched.chosen(0, episodes)) else "batched"
    return {
        **{f"{name}_per_second": round(rate, 1) for name, rate in rates.items()},
        "taken": taken,
        "seconds_10000": round(10_000 / rates[taken], 1),
        "batched_seconds_10000": round(10_000 / rates["batched"], 1),
        "gflop": round(gflop(partial(matched.matching.match_batch, one)), 4),
    }


def embedding_rates(shards: ShardSet, device: torch.device) -> dict[str, float]:
    """Measure videos a second of ResNet-50: from shards through the loader, and from memory."""
    rows = shards.split_rows("train")[:VIDEOS]
    model = create_method("prototype", trunk="resnet50").eval().to(device)
    assert model.trunk is not None
    clips = torch.rand(len(rows), 8, 3, 224, 224, device=device)
    rules = EpisodeRules(way=1, groups="any")

    def alone(_: int) -> None:
        with torch.no_grad():
            for part in clips.split(BATCH):
                model.trunk(part)
        synchronise(device)

    with EpisodeLoader(shards, "train", rules, device=device) as loader:

        def embedded(_: int) -> None:
            embed_rows(loader, model, rows)
            synchronise(device)

        contestants = [Contestant("embedded", embedded), Contestant("trunk", alone)]
        for each in contestants if device.type == "cuda" else contestants[:0]:
            each.run(1)
        timings = time_in_turn(contestants, rounds=ROUNDS, counts=[len(rows)] * 2)
    return {name: timing.rate for name, timing in timings.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = ["method", "shots", "usual way, from the trunk's rate", "one by one", "in batches", "from a table",
            "10,000 episodes", "FLOP bound", "batches' share of it"]  # fmt: skip
    return markdown_table(head, [_line(row) for row in rows])


def _line(row: dict[str, Any]) -> list[str]:
    by_table = f"{row['table_per_second']:.0f}/s" if "table_per_second" in row else ""
    return [
        row["method"],
        str(row["shot"]),
        f"{row['usual_per_second']:.3f}/s",
        f"{row['one_by_one_per_second']:.0f}/s",
        f"{row['batched_per_second']:.0f}/s",
        by_table,
        f"{row['seconds_10000']:.1f} s" + (f" (in batches {row['batched_seconds_10000']:.1f} s)" if by_table else ""),
        f"{row['bound_per_second']:.0f}/s",
        f"{row['share_of_bound']:.0%}",
    ]


@click.command()
@click.option(
    "--videos", type=click.Path(path_type=Path), help="CLASS/video files.  [default: clips made for this run]"
)
@click.option(
    "--method", "only", multiple=True, type=click.Choice(list(METHODS)), help="Only these; nothing is written."
)
@click.option("--episodes", type=click.IntRange(1), default=10_000, show_default=True)
@click.option("--test-videos", type=click.IntRange(500), default=500, show_default=True, help="Embedded at random.")
@click.option("--queries", type=click.IntRange(1), default=6, show_default=True, help="For each class.")
@click.option("--seconds", default=3.0, show_default=True, help="Of one way of matching; the rest follows its rate.")
@click.option("--device", default="cpu", show_default=True)
def main(
    videos: Path | None,
    only: tuple[str, ...],
    episodes: int,
    test_videos: int,
    queries: int,
    seconds: float,
    device: str,
) -> None:
    """Time 5-way 1-shot and 5-shot evaluations of every method; print and store a table."""
    place, before = torch.device(device), load_average()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        videos = videos or make_clips(scratch / "videos", classes=2)
        shards = stack.enter_context(ShardSet.open(make_shards(videos, scratch / "shards", 2)))
        embedding = embedding_rates(shards, place)
        make_set(scratch / "many", test_videos)
        build_index(scratch / "many")
        many = stack.enter_context(ShardSet.open(scratch / "many"))
        rate = matmul_rate(place)
        rows = []
        for name in only or METHODS:
            for shot in SHOTS:
                rules = EpisodeRules(shot=shot, queries=queries, groups="any")
                row = {"method": name, "shot": shot}
                row |= measure(Matched(name, many, rules, place), episodes=episodes, seconds=seconds)
                row["usual_per_second"] = round(embedding["trunk"] / (5 * (shot + queries)), 4)
                rows.append(row)
        rate = max(rate, matmul_rate(place))
    for row in rows:
        row["bound_per_second"] = round(rate / row["gflop"], 1)
        row["share_of_bound"] = round(row["batched_per_second"] / row["bound_per_second"], 3)
    click.echo(table(rows))
    share = embedding["embedded"] / embedding["trunk"]
    click.echo(f"embedding: {embedding['embedded']:.2f} videos/s, {share:.0%} of ResNet-50 alone")
    context = {"device": device, "threads": torch.get_num_threads(), "episodes": episodes, "seconds": seconds}
    context |= {"way": 5, "queries": 5 * queries, "frames": 8, "test_videos": test_videos, "per_class": PER_CLASS}
    context |= {"embeddings": "random", "videos": "given" if videos.parent != scratch else "made"}
    context |= {"matmul_gflop_per_second": round(rate, 1), "load_average_before": before}
    context |= {f"{name}_videos_per_second": round(value, 3) for name, value in embedding.items()}
    if not only:
        click.echo(f"written: {write_result('evaluate', rows, context=context)}")


if __name__ == "__main__":
    run_command(main)
