"""Odd episodes, for every method: few and many frames, ties, zeros, one query, permutations, unequal shots."""

from __future__ import annotations

import pytest
import torch

from fsar.episode import Episode
from fsar.matching import bi_mean_hausdorff, otam, otam_both, set_cost
from fsar.methods import METHODS, Embedding, create_method, method_options
from shards_spec.errors import ConfigError

CHANNELS = 32
FEWEST = {"molo": 2, "trx": 3}  # frames; one suffices elsewhere
OPTIONS = {"trx": {"width": 24}, "ctx": {"width": 24}}
CASES = [(name, {}) for name in METHODS]
CASES += [("molo", {"metric": "otam"}), ("otam", {"support_merge": "prototype"}), ("ctx", {"metric": "euclidean"})]
CASES += [(name, {"support_merge": "video"}) for name in ("hyrsm", "hyrsm++", "prototype")]
every = pytest.mark.parametrize(("name", "options"), CASES)


def make_model(name, options, **more):
    torch.manual_seed(0)
    usual = {"dropout": False, "heads": 4, "recons_weight": 0.0, "num_classes": 6}
    known = {key: value for key, value in usual.items() if key in method_options(name)}
    return create_method(name, trunk=None, channels=CHANNELS, **(known | OPTIONS.get(name, {}) | options | more))


def videos(name, *shape, frames=4, seed=1) -> torch.Tensor:
    """Signed features [*shape, T, C], maps for MoLo."""
    places = (3, 3) if name == "molo" else ()
    return torch.randn(*shape, frames, CHANNELS, *places, generator=torch.Generator().manual_seed(seed))


def make_episode(name, *, way=3, shot=2, queries=4, frames=4, **more) -> Episode:
    fields = {
        "support": None,
        "query": None,
        "support_features": videos(name, way, shot, frames=frames),
        "query_features": videos(name, queries, frames=frames, seed=2),
        "query_labels": torch.arange(queries) % way,
        "class_ids": torch.arange(way),
        "base_ids": torch.arange(way),
    }
    return Episode(**(fields | more))


def changed(episode, **fields) -> Episode:
    """The episode with other features, and labels that fit them."""
    values = {key: getattr(episode, key) for key in ("support_features", "query_features", "support_mask")} | fields
    way, queries = len(values["support_features"]), len(values["query_features"])
    labels = {
        "query_labels": torch.arange(queries) % way,
        "class_ids": torch.arange(way),
        "base_ids": torch.arange(way),
    }
    return Episode(support=None, query=None, **values, **labels)


def logits_of(model, episode) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(episode).logits


def check_finite(model, episode) -> None:
    """Logits, losses and the gradients of features and weights."""
    episode.support_features.requires_grad_()
    episode.query_features.requires_grad_()
    output = model.train()(episode)
    assert output.logits.shape == (len(episode.query_labels), episode.way)
    assert output.logits.isfinite().all()
    output.loss.backward()
    gradients = [episode.support_features.grad, episode.query_features.grad, *(p.grad for p in model.parameters())]
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


def same(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frames", [1, 2, 16, 32])
@every
def test_any_number_of_frames(name, options, frames):
    if name == "trx" and frames == 32:
        options = {"tuple_sizes": (2,)}  # there are 4960 triples
    model, episode = make_model(name, options), make_episode(name, frames=frames, queries=2)
    if frames >= FEWEST.get(name, 1):
        check_finite(model, episode)
        return
    with pytest.raises(ConfigError, match=r"^[^\n]*frames[^\n]*$"):
        model(episode)


@pytest.mark.parametrize("metric", [otam, otam_both])
def test_alignment_of_opposite_videos_has_gradients(metric):
    distance = torch.full((2, 32, 32), 2.0, requires_grad=True)  # bare exponentials are 0 from 10 on
    metric(distance).sum().backward()
    assert distance.grad.isfinite().all()
    assert distance.grad.sum() > 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("otam", {}),
        ("trx", {}),
        ("ctx", {}),
        ("prototype", {}),
        ("molo", {}),
        ("molo", {"metric": "otam"}),
        ("hyrsm", {}),
        ("hyrsm++", {"support_merge": "video"}),
    ],
)
def test_support_and_query_of_unequal_length(name, options):
    """A query's logits are those of an episode in which the other videos have another length."""
    model = make_model(name, options).eval()
    with torch.no_grad():
        support, query = (embed(model, name, *shape, frames=frames) for shape, frames in (((3, 2), 6), ((4,), 4)))
        logits = model.match(support, query)
        assert logits.shape == (4, 3)
        assert logits.isfinite().all()
        same(model.match(support, query.map(lambda x: x[:1])), logits[:1])


def embed(model, name, *shape, frames) -> Embedding:
    values = videos(name, *shape, frames=frames).flatten(0, len(shape) - 1)
    return model.embed(model._stored(values)).map(lambda x: x.unflatten(0, shape))


@every
def test_equal_classes_have_equal_logits(name, options):
    model, episode = make_model(name, options), make_episode(name)
    support = episode.support_features.clone()
    support[1] = support[0]
    query = episode.query_features.clone()
    query[0] = support[0, 0]  # a tie at distance 0
    episode = changed(episode, support_features=support, query_features=query)
    logits = logits_of(model, episode)
    same(logits[:, 0], logits[:, 1])
    check_finite(model, episode)


@pytest.mark.parametrize("zeros", ["support", "query", "both"])
@every
def test_features_of_zeros(name, options, zeros):
    episode = make_episode(name)
    for side in ("support", "query"):
        if zeros in (side, "both"):
            getattr(episode, f"{side}_features").zero_()
    check_finite(make_model(name, options), episode)


@every
def test_smallest_episode(name, options):
    check_finite(make_model(name, options), make_episode(name, way=2, shot=1, queries=1))


@every
def test_order_of_classes_shots_and_queries(name, options):
    model, episode = make_model(name, options), make_episode(name, shot=3)
    logits = logits_of(model, episode)
    support, query = episode.support_features, episode.query_features
    classes, shots, queries = torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0]), torch.tensor([3, 1, 0, 2])
    same(logits_of(model, changed(episode, support_features=support[classes])), logits[:, classes])
    same(logits_of(model, changed(episode, support_features=support[:, shots])), logits)
    same(logits_of(model, changed(episode, query_features=query[queries])), logits[queries])


@every
def test_padding_is_as_if_absent(name, options):
    """A class of two under a mask of three places is a class of two."""
    model, episode = make_model(name, options), make_episode(name, shot=2)
    logits = logits_of(model, episode)
    padding = torch.full_like(episode.support_features[:, :1], 1e4)
    support = torch.cat([episode.support_features[:, :1], padding, episode.support_features[:, 1:]], dim=1)
    mask = torch.tensor([[True, False, True]]).expand(3, -1).contiguous()
    same(logits_of(model, changed(episode, support_features=support, support_mask=mask)), logits)


@every
def test_bfloat16_is_near(name, options):
    model, episode = make_model(name, options), make_episode(name)
    exact = logits_of(model, episode)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = logits_of(model, episode)
    assert (near - exact).norm() < 0.03 * exact.norm()


def test_metrics_by_name():
    distance = torch.rand(3, 4, 5, 6)
    torch.testing.assert_close(set_cost(distance), bi_mean_hausdorff(distance))
    torch.testing.assert_close(set_cost(distance, metric="otam", smoothing=0.3), otam_both(distance, 0.3))
    one_way = set_cost(distance, metric="otam", single_direction=True)
    torch.testing.assert_close(one_way, otam(distance))


def test_molo_aligns_both_branches():
    model = make_model("molo", {"metric": "otam", "smoothing": 0.2}).eval()
    with torch.no_grad():
        support, query = embed(model, "molo", 3, 1, frames=5), embed(model, "molo", 4, frames=5)
        plain = [otam_both(cosine_table(a, b[:, 0]), 0.2) for a, b in branches(query, support)]
        same(model.match(support, query), -(plain[0] + model.motion_weight * plain[1]))
    with pytest.raises(ConfigError, match='choose "hausdorff" or "otam"'):
        make_model("molo", {"metric": "dtw"})
    with pytest.raises(ConfigError, match="above 0"):
        make_model("molo", {"smoothing": 0.0})


def branches(*embeddings):
    return zip(*((embedding.tokens, embedding.motion) for embedding in embeddings), strict=True)


def cosine_table(a, b) -> torch.Tensor:
    """[Q, n, C], [W, m, C] -> [Q, W, n, m]."""
    a, b = a[:, None, :, None], b[None, :, None]
    return 1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1) + 0.01)
