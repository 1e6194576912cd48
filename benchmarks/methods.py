"""What matching costs: each method in our order of operations and in that of published code, same weights.

    python -m benchmarks.methods [--device cuda]

* match: from the last tensors that both sides compute alike (features of the trunk, or for HyRSM and MoLo the
  tokens behind the transformer) to the logits.
* head: from the features of the trunk to the logits, where that is more.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import click
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import reference_order
from benchmarks.bounds import synchronise
from benchmarks.environment import load_average, write_result
from benchmarks.timing import Contestant, markdown_table, time_in_turn, warm_up
from fsar.methods import Embedding, create_method
from fsar.trunks import Features

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fsar.methods import FewShotMethod

SIDES = ("ours", "reference")


@dataclass(frozen=True)
class Sizes:
    """An episode and the width of its features."""

    way: int = 5
    shot: int = 5
    queries: int = 25
    frames: int = 8
    channels: int = 2048


@dataclass(frozen=True)
class Case:
    """One comparison: two functions (model, support, query) that give the same logits, and the same loss of the method's own."""

    method: str
    ours: Callable[[Any, Any, Any], tuple[Tensor, Tensor]]
    reference: Callable[[Any, Any, Any], tuple[Tensor, Tensor]]
    scope: str = "match"
    options: dict[str, Any] = field(default_factory=dict)


def matched(model: FewShotMethod, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Ours, from pooled features [way, shot, T, C] and [Q, T, C]."""
    own, theirs = embedded(model, support), model.embed(Features(None, query))
    logits = model.match(own, theirs)
    return logits, logits.new_zeros(())


def embedded(model: FewShotMethod, support: Tensor) -> Embedding:
    """[way, shot, T, C] -> embedding [way, shot, ...]."""
    embedding = model.embed(Features(None, support.flatten(0, 1)))
    return embedding.map(lambda x: x.unflatten(0, support.shape[:2]))


def matched_molo(model: Any, support: tuple[Tensor, Tensor], query: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Ours, from tokens and motion tokens."""
    logits = model.match(Embedding(*support), Embedding(*query))
    return logits, logits.new_zeros(())


def matched_hyrsm(model: Any, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Ours, from the tokens behind the transformer, with the temporal term of HyRSM++."""
    members, queries = model.fuse(model.members(support, None), query)
    logits = model.logits(members, queries, None, len(support))
    return logits, sum(model.fused_losses(members, queries).values(), start=logits.new_zeros(()))


def behind_transformer(side: Callable[..., Any], model: FewShotMethod, support: Tensor, query: Tensor) -> Any:
    """Features -> what a side makes of their tokens."""
    return side(model, embedded(model, support).tokens, model.embed(Features(None, query)).tokens)


CASES = [
    Case("molo", matched_molo, reference_order.molo),
    *(Case(name, matched_hyrsm, reference_order.hyrsm) for name in ("hyrsm", "hyrsm++")),
    *(
        Case(name, partial(behind_transformer, matched_hyrsm), partial(behind_transformer, reference_order.hyrsm), "head")
        for name in ("hyrsm", "hyrsm++")
    ),
    Case("otam", matched, reference_order.otam),
    Case("trx", matched, reference_order.trx),
    Case("ctx", matched, reference_order.ctx),
    Case("prototype", matched, reference_order.prototype, options={"support_merge": "video", "temperature": 1.0}),
]


class Work:
    """A model, an episode for it, and what a side does with them."""

    def __init__(self, case: Case, sizes: Sizes, device: torch.device) -> None:
        torch.manual_seed(0)
        options = {"trunk": None, "channels": sizes.channels, "frames": sizes.frames} | case.options
        self.case = case
        self.model = create_method(case.method, **options).eval().to(device)  # eval: no dropout on either side
        self.labels = (torch.arange(sizes.queries) % sizes.way).to(device)
        parts = 2 if case.method == "molo" else 1  # tokens and motion tokens, each with a global one
        made = [episode_tensors(sizes, self.labels, steps=sizes.frames + parts - 1) for _ in range(parts)]
        self.leaves = [tensor.requires_grad_() for pair in made for tensor in pair]
        self.leaves += [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.support, self.query = zip(*made, strict=True) if parts == 2 else made[0]  # noqa: PLR2004

    def logits(self, side: str) -> tuple[Tensor, Tensor]:
        """Logits [Q, way] of "ours" or "reference", and the loss that the method adds."""
        out: tuple[Tensor, Tensor] = getattr(self.case, side)(self.model, self.support, self.query)
        return out

    def gradients(self, side: str) -> list[Tensor | None]:
        """Of cross-entropy and the added loss, by inputs and parameters."""
        logits, extra = self.logits(side)
        for leaf in self.leaves:
            leaf.grad = None
        (F.cross_entropy(logits, self.labels) + extra).backward()
        return [leaf.grad for leaf in self.leaves]

    def forward(self, side: str) -> None:
        """The logits alone, as in evaluation."""
        with torch.no_grad():
            self.logits(side)

    def check(self) -> None:
        """Raise AssertionError unless both sides give the same logits and gradients up to rounding."""
        for ours, theirs in zip(self.logits("ours"), self.logits("reference"), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(self.gradients("ours"), self.gradients("reference"), strict=True):
            if ours is None or theirs is None:
                assert all(each is None or not each.any() for each in (ours, theirs))
                continue
            assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-5  # noqa: PLR2004

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


def episode_tensors(sizes: Sizes, labels: Tensor, *, steps: int) -> tuple[Tensor, Tensor]:
    """Support [way, shot, steps, C] and query [Q, steps, C], like pooled ReLU features around a class mean."""
    shape = (steps, sizes.channels)
    centres = 0.3 * torch.randn(sizes.way, *shape, device=labels.device)
    support = centres[:, None] + torch.randn(sizes.way, sizes.shot, *shape, device=labels.device)
    query = centres[labels] + torch.randn(sizes.queries, *shape, device=labels.device)
    return support.relu(), query.relu()


def gflop(function: Callable[[], object]) -> float:
    """Floating-point operations of its matrix products and convolutions, in 1e9."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e9


def matmul_rate(device: torch.device, *, size: int = 2048, times: int = 10) -> float:
    """GFLOP a second of this machine: the best of several products of square float32 matrices."""
    a, b = torch.randn(2, size, size, device=device)

    def multiply(count: int) -> None:
        for _ in range(count):
            a @ b
        synchronise(device)

    multiply(1)
    timings = time_in_turn([Contestant("product", multiply)], rounds=times, counts=[1])
    return 2 * size**3 / min(timings["product"].wall) / 1e9


def measure(case: Case, sizes: Sizes, device: torch.device, *, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Rows of one case: forward, then forward and backward."""
    work = Work(case, sizes, device)
    work.check()
    kept = {side: work.kept_mib(side) for side in SIDES}
    rows = []
    for name, step, counted in (
        ("forward", work.forward, work.logits),  # the counter wants gradients
        ("forward+backward", work.gradients, work.gradients),
    ):
        contestants = [Contestant(side, partial(repeat, step, side, device)) for side in SIDES]
        counts = warm_up(contestants, seconds=seconds, workers=1, least=1)
        timings = time_in_turn(contestants, rounds=rounds, counts=counts)
        row: dict[str, Any] = {"name": f"{case.method}, {case.scope}, {name}", "method": case.method}
        row |= {"scope": case.scope, "pass": name}
        for side in SIDES:
            times = [1000 / rate for rate in timings[side].rates]
            row[f"{side}_ms"] = round(1000 / timings[side].rate, 3)
            row |= {f"{side}_least_ms": round(min(times), 3), f"{side}_most_ms": round(max(times), 3)}
            row[f"{side}_gflop"] = round(gflop(partial(counted, side)), 3)
            row[f"{side}_kept_mib"] = round(kept[side], 1)
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
    head = ["method", "ours", "reference order", "ratio", "ours, at matmul rate", "part of it", "kept", "kept, reference"]
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
@click.option("--seconds", default=1.0, show_default=True, help="Of each side in a round.")
@click.option("--method", "only", multiple=True, help="These alone; nothing is written then.")
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
