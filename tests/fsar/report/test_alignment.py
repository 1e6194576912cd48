"""What methods say they match: each step's nearest or OTAM's paths, and that the logits are made of just these."""

from __future__ import annotations

import pytest
import torch

from fsar.episode import Episode
from fsar.matching import Alignment, matched, otam, path_weights, token_cosine
from fsar.methods import METHODS, Embedding, create_method
from fsar.methods.otam import OTAM
from fsar.methods.reconstruction import steps_of, video_scale
from fsar.report.alignment import align, reconstruct
from fsar.trunks import Features

DISTANCE = torch.tensor([[0.1, 0.9, 0.8], [0.7, 0.2, 0.9], [0.6, 0.3, 0.5]])  # query frames down, support across


def random_features(videos: int, *, seed: int, frames: int = 4, channels: int = 16) -> Features:
    maps = torch.randn(videos, frames, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    return Features(maps, maps.mean(dim=(-2, -1)))


def moving_episode() -> Episode:
    """Images and flow of 2 queries and their classes, 4 frames each."""
    support, query = torch.randn(2, 1, 4, 3, 32, 32), torch.randn(2, 4, 3, 32, 32)
    motion = {"support_motion": torch.randn(2, 1, 4, 2, 8, 8), "query_motion": torch.randn(2, 4, 2, 8, 8)}
    return Episode(support, query, torch.arange(2), torch.arange(2), torch.arange(2), **motion)


def embedded(model, *, shot: int = 1) -> tuple[Embedding, Embedding]:
    """Queries [5, ...] and support [3, shot, ...] of random features."""
    support = model.embed(random_features(3 * shot, seed=1))
    return model.embed(random_features(5, seed=2)), support.map(lambda x: x.unflatten(0, (3, shot)))


def test_nearest_frames_of_both_directions_by_hand() -> None:
    pairs = matched(DISTANCE[None, None]).pairs(0, 0)
    assert [(p.query, p.support, p.of_query, p.of_support) for p in pairs] == [
        (0, 0, 1, 1),
        (1, 1, 1, 1),
        (2, 1, 1, 0),  # its nearest is frame 1, whose nearest is another
        (2, 2, 0, 1),
    ]
    assert pairs[0].similarity == pytest.approx(0.9)
    assert matched(DISTANCE[None, None], single_direction=True).of_support is None


def test_attention_over_all_videos_of_a_class_has_lines_too() -> None:
    """However small its weights are: those beside the largest, and no more than two of a step of the query."""
    shares = torch.tensor([[0.02, 0.04, 0.03, 0.0], [0.001, 0.001, 0.001, 0.001]])[None, None]
    found = Alignment(torch.zeros_like(shares), shares, None)
    assert [(p.query, p.support) for p in found.pairs(0, 0)] == [(0, 1), (0, 2)]
    assert Alignment(torch.zeros_like(shares), 0 * shares, None).pairs(0, 0) == []


def test_otam_weights_are_those_of_its_best_paths() -> None:
    generator = torch.Generator().manual_seed(0)
    distance = torch.rand(2, 3, 5, 6, generator=generator)
    soft = path_weights(distance, 0.1)
    torch.testing.assert_close(soft[..., 1:].sum(dim=-2), torch.ones(2, 3, 5))  # each column is visited once
    assert bool((soft[..., 0].sum(dim=-1) > 1 - 1e-5).all())  # but for moves down in the first
    assert bool((soft >= 0).all())
    # The weights are the derivative of the cost: nearly hard, they pick the cells whose sum is the cost.
    hard = path_weights(distance, 1e-3)
    torch.testing.assert_close((hard * distance).sum(dim=(-2, -1)), otam(distance, 1e-3), atol=0.02, rtol=0)
    visited = hard.argmax(dim=-2)
    assert bool((visited[..., 1:] >= visited[..., :-1]).all())  # in order


@pytest.mark.parametrize("shot", [1, 2])
def test_hausdorff_logits_are_sums_over_the_pairs(shot: int) -> None:
    torch.manual_seed(0)
    for name in ("molo", "hyrsm"):
        model = create_method(name, trunk=None, channels=16, frames=4, num_classes=3).eval()
        with torch.no_grad():
            query, support = embedded(model, shot=shot)
            logits, found = model.match(support, query), align(model, query, support)
        costs = {
            name: ((each.of_query + each.of_support) * (1 - each.similarity)).sum(dim=(-2, -1))
            for name, each in found.items()
        }
        total = costs["frames"] + 0.3 * costs["motion"] if name == "molo" else costs["frames"]
        torch.testing.assert_close(-total, logits, atol=1e-4, rtol=1e-4)


def test_every_method_says_what_it_aligns() -> None:
    torch.manual_seed(0)
    kinds = {}
    for name in METHODS:
        model = create_method(name, trunk=None, channels=16, frames=4).eval()
        with torch.no_grad():
            query, support = embedded(model, shot=2)
            kinds[name] = align(model, query, support)
        for each in kinds[name].values():
            assert each.total.shape == each.similarity.shape[:2]
    assert {name: list(each) for name, each in kinds.items()} == {
        "molo": ["frames", "motion"],
        "prototype": [],
        "motion": [],
        "trx": [],
    } | {name: ["frames"] for name in ("hyrsm", "hyrsm++", "otam", "ctx", "clip-fsar")}
    assert kinds["otam"]["frames"].similarity.shape == (5, 6, 4, 4)  # each video; others: each class
    assert kinds["ctx"]["frames"].of_query.unflatten(1, (3, 2)).sum(dim=(2, 4)).allclose(torch.ones(5, 3, 4))
    assert kinds["molo"]["motion"].similarity.shape == (5, 3, 3, 3)


def test_the_decoder_is_looked_at_where_it_is_trained() -> None:
    features, episode = random_features(2, seed=3), moving_episode()
    model = create_method("molo", trunk=None, channels=16, frames=4)
    assert reconstruct(model, features, episode).decoded.shape == (2, 3, 3, 32, 32)
    untrained = create_method("molo", trunk=None, channels=16, frames=4, recons_weight=0)
    assert reconstruct(untrained, features, episode) is None
    assert reconstruct(create_method("otam", trunk=None, channels=16, frames=4), features, episode) is None


@pytest.mark.parametrize("norm", ["none", "video"])
@pytest.mark.parametrize("kind", ["frames", "difference", "flow"])
def test_a_perfect_decoder_has_no_error_and_an_idle_one_that_of_no_motion(kind: str, norm: str) -> None:
    """In the unit of the input, whatever the decoder is trained to make; frames without motion are those before."""
    features, episode = random_features(2, seed=3), moving_episode()
    model = create_method("molo", trunk=None, channels=16, frames=4, recons_target=kind, recons_norm=norm)
    idle = reconstruct(model, features, episode).still
    videos = episode.query_motion if kind == "flow" else episode.query
    assert torch.equal(idle, videos[:, :-1] if kind == "frames" else torch.zeros_like(idle))
    for made, expected in ((steps_of(kind, videos), 0.0), (idle, 1.0)):
        unit = video_scale(steps_of(kind, videos)) if norm == "video" else 1.0
        model.decoder.forward = lambda *_, made=made / unit: made.flatten(0, 1)
        error, still = reconstruct(model, features, episode).errors()
        torch.testing.assert_close(error / still, torch.full((2,), expected), atol=1e-6, rtol=1e-5)


def test_a_method_of_ones_own_says_what_it_aligns() -> None:
    class Own(OTAM):
        """One of its own, and one that inherits."""

    class Inherits(Own):
        """Nothing of its own."""

    @align.register(Own)
    def _(_model: Own, query: Embedding, support: Embedding, **_: torch.Tensor | None) -> dict[str, Alignment]:
        return {"own": matched(1 - token_cosine(query.tokens, support.tokens.flatten(0, 1)))}

    for kind in (Own, Inherits):
        assert list(align(kind(trunk=None, channels=16, frames=4), *embedded(kind(trunk=None, channels=16)))) == ["own"]
