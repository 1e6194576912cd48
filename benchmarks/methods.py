"""Measure the cost of matching: each method in our order of operations and in that of published code, same weights.

    python -m benchmarks.methods [--device cuda]

* match: embeddings -> logits, as in evaluation, where we embed each video once.  The published order starts from
  the same tokens. TRX and CTX start from the features of the trunk, since they project within the matching.
* head: features of the trunk -> logits, and the gradients of all weights behind the trunk, as in training.

Each run first checks that both sides give the same logits and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure.bounds import gflop, matmul_rate, synchronise
from benchmarks.measure.environment import load_average, write_result
from benchmarks.measure.timing import Contestant, markdown_table, time_in_turn, warm_up
from benchmarks.sides import reference_order
from fsar.methods import Embedding, FewShotMethod, create_method
from fsar.methods.hyrsm import HyRSM
from fsar.methods.molo import MoLo
from fsar.trunks import Features

SIDES = ("ours", "reference")


@dataclass(frozen=True)
class Sizes:
    """An episode and the width of its features."""

    way: int = 5
    shot: int = 5
    queries: int = 25
    frames: int = 8
    channels: int = 2048


Side = Callable[[Any, Any, Any], "tuple[Tensor, Tensor]"]  # model, support, query -> logits, a loss of its own


@dataclass(frozen=True)
class Case:
    """One comparison: two sides that give the same logits; with `embeds`, ours gets embeddings instead of features."""

    method: str
    scope: str
    ours: Side
    reference: Side
    embeds: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def match(model: FewShotMethod, support: Embedding, query: Embedding) -> tuple[Tensor, Tensor]:
    """Ours, from embeddings."""
    logits = model.match(support, query)
    return logits, logits.new_zeros(())


def match_features(model: FewShotMethod, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Ours, from pooled features [way, shot, T, C] and [Q, T, C]."""
    return match(model, *embed(model, support, query))


def match_branches(model: MoLo, support: Sequence[Tensor], query: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Ours, from tokens and motion tokens."""
    return match(model, Embedding(*support), Embedding(*query))


def match_sets(model: HyRSM, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Ours, from the tokens behind the transformer, with the temporal term of HyRSM++."""
    projected = model.project(support.flatten(0, 1)).unflatten(0, support.shape[:2])
    members, queries = model.fuse(model.members(projected, None), model.project(query))
    logits = model.logits(members, queries, None, len(support))
    return logits, sum(model.fused_losses(members, queries).values(), start=logits.new_zeros(()))


def behind_transformer(side: Side, model: HyRSM, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Make the output of a side from the tokens of features."""
    own = model.frames_of(Features(None, support.flatten(0, 1))).unflatten(0, support.shape[:2])
    return side(model, own, model.frames_of(Features(None, query)))


def embed(model: FewShotMethod, support: Tensor, query: Tensor) -> tuple[Embedding, Embedding]:
    """Features [way, shot, T, C] and [Q, T, C] -> embeddings [way, shot, ...] and [Q, ...]."""
    own = model.embed(Features(None, support.flatten(0, 1)))
    return own.map(lambda x: x.unflatten(0, support.shape[:2])), model.embed(Features(None, query))


HYRSM = ("hyrsm", "hyrsm++")
HYRSM_SIDES = (match_sets, reference_order.hyrsm)
SINGLE_VIDEOS = {"support_merge": "video", "temperature": 1.0}  # what published code has
CASES = [
    Case("molo", "match", match_branches, reference_order.molo),
    *(Case(name, "match", *HYRSM_SIDES) for name in HYRSM),
    *(Case(name, "head", *(partial(behind_transformer, side) for side in HYRSM_SIDES)) for name in HYRSM),
    Case("otam", "match", match_features, reference_order.otam),
    Case("trx", "match", match, reference_order.trx, embeds=True),
    Case("trx", "head", match_features, reference_order.trx),
    Case("ctx", "match", match, reference_order.ctx, embeds=True),
    Case("ctx", "head", match_features, reference_order.ctx),
    Case("prototype", "match", match_features, reference_order.prototype, options=SINGLE_VIDEOS),
]


class Work:
    """A model, an episode for it, and what a side does with them."""

    def __init__(self, case: Case, sizes: Sizes, device: torch.device) -> None:
        torch.manual_seed(0)
        options = {"trunk": None, "channels": sizes.channels, "frames": sizes.frames} | case.options
        self.case = case
        self.model = create_method(case.method, **options).eval().to(device)  # eval: no dropout on either side
        self.labels = (torch.arange(sizes.queries) % sizes.way).to(device)
        # MoLo's are tokens and motion tokens.
        steps = (sizes.frames, sizes.frames - 1) if case.method == "molo" else (sizes.frames,)
        made = [episode_tensors(sizes, self.labels, steps=number) for number in steps]
        inputs: tuple[Any, ...] = made[0] if len(made) == 1 else tuple(zip(*made, strict=True))
        self.leaves = [tensor.requires_grad_() for pair in made for tensor in pair]
        self.leaves += [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.inputs = dict.fromkeys(SIDES, inputs)
        if case.embeds:
            with torch.no_grad():
                self.inputs["ours"] = embed(self.model, *inputs)

    def logits(self, side: str) -> tuple[Tensor, Tensor]:
        """Logits [Q, way] of "ours" or "reference", and the loss that the method adds."""
        out: tuple[Tensor, Tensor] = getattr(self.case, side)(self.model, *self.inputs[side])
        return out

    def gradients(self, side: str) -> list[Tensor | None]:
        """Of cross-entropy and the added loss, by inputs and parameters."""
        logits, extra = self.logits(side)
        for leaf in self.leaves:
            leaf.grad = None
        (F.cross_entropy(logits, self.labels) + extra).backward()
        return [leaf.grad for leaf in self.leaves]

    def forward(self, side: str) -> None:
        """Compute the logits, as in evaluation."""
        with torch.no_grad():
            self.logits(side)

    def check(self) -> None:
        """Raise AssertionError unless both sides give the same logits and gradients up to rounding."""
        for ours, theirs in zip(self.logits("ours"), self.logits("reference"), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        if self.case.embeds:
            return
        for ours, theirs in zip(self.gradients("ours"), self.gradients("reference"), strict=True):
            if ours is None or theirs is None:
                assert all(each is None or not each.any() for each in (ours, theirs))
                continue
            assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-5

    def kept_mib(self, side: str) -> float:
        """Memory that the forward pass keeps for the backward pass, without inputs and parameters."""
        known = {leaf.untyped_storage().data_ptr() for leaf in self.leaves}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            held = self.logits(side)
        del held
        return sum(size for place, size in kept.items() if place not in known) / 2**20


PASSES: list[tuple[str, Callable[[Work, str], object], Callable[[Work, str], object]]] = [
    ("forward", Work.forward, Work.logits),  # counted with gradients, which the counter wants
    ("forward+backward", Work.gradients, Work.gradients),
]


def episode_tensors(sizes: Sizes, labels: Tensor, *, steps: int) -> tuple[Tensor, Tensor]:
    """Support [way, shot, steps, C] and query [Q, steps, C], like pooled ReLU features around a class mean."""
    shape = (steps, sizes.channels)
    centres = 0.3 * torch.randn(sizes.way, *shape, device=labels.device)
    support = centres[:, None] + torch.randn(sizes.way, sizes.shot, *shape, device=labels.device)
    query = centres[labels] + torch.randn(sizes.queries, *shape, device=labels.device)
    return support.relu(), query.relu()


def measure(case: Case, sizes: Sizes, device: torch.device, *, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Rows of one case: forward, then forward and backward."""
    work = Work(case, sizes, device)
    work.check()
    rows = []
    for name, step, counted in PASSES:
        if case.embeds and name != "forward":  # no weights to train in ours
            continue
        contestants = [Contestant(side, partial(repeat, partial(step, work), side, device)) for side in SIDES]
        counts = warm_up(contestants, seconds=seconds, workers=1, least=1)
        timings = time_in_turn(contestants, rounds=rounds, counts=counts)
        row: dict[str, Any] = {"name": f"{case.method}, {case.scope}, {name}"}
        row |= {"method": case.method, "scope": case.scope, "pass": name}
        for side in SIDES:
            times = [1000 / rate for rate in timings[side].rates]
            row[f"{side}_ms"] = round(1000 / timings[side].rate, 3)
            row |= {f"{side}_least_ms": round(min(times), 3), f"{side}_most_ms": round(max(times), 3)}
            row[f"{side}_gflop"] = round(gflop(partial(counted, work, side)), 3)
            row[f"{side}_kept_mib"] = round(work.kept_mib(side), 1)
        row["ratio"] = round(row["reference_ms"] / row["ours_ms"], 2)
        rows.append(row)
    return rows


def repeat(step: Callable[[str], object], side: str, device: torch.device, count: int) -> None:
    """A side's step, several times over."""
    for _ in range(count):
        step(side)
    synchronise(device)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = ["what", "ours", "published order", "ratio", "ours at matmul rate", "part of it", "kept", "kept, published"]
    lines = [
        [
            row["name"],
            f"{row['ours_ms']:.2f} ms",
            f"{row['reference_ms']:.2f} ms",
            f"{row['ratio']:.2f}",
            f"{row['bound_ms']:.2f} ms",
            f"{row['part_of_bound']:.0%}",
            f"{row['ours_kept_mib']:.0f} MiB",
            f"{row['reference_kept_mib']:.0f} MiB",
        ]
        for row in rows
    ]
    return markdown_table(head, lines)


@click.command()
@click.option("--device", default="cpu", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option("--seconds", default=0.5, show_default=True, help="Of each side in a round.")
@click.option("--method", "only", multiple=True, help="Only these; nothing is written then.")
def main(device: str, rounds: int, seconds: float, only: tuple[str, ...]) -> None:
    """Time both orders of every method on a 5-way 5-shot episode with 25 queries; print and store a table."""
    place, sizes, before = torch.device(device), Sizes(), load_average()
    rate = matmul_rate(place)
    rows = []
    for case in CASES:
        if not only or case.method in only:
            rows += measure(case, sizes, place, rounds=rounds, seconds=seconds)
    rate = max(rate, matmul_rate(place))
    for row in rows:
        row["bound_ms"] = round(row["ours_gflop"] / rate * 1000, 3)
        row["part_of_bound"] = round(row["bound_ms"] / row["ours_ms"], 3)
    click.echo(table(rows))
    context = {"episode": asdict(sizes), "device": device, "threads": torch.get_num_threads(), "rounds": rounds}
    context |= {"matmul_gflop_per_second": round(rate, 1), "load_average_before": before}
    if not only:
        click.echo(f"written: {write_result(f'methods-{place.type}', rows, context=context)}")


if __name__ == "__main__":
    main()
