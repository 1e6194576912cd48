"""Many episodes at a time, or from a table of pairs: the logits of one episode after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fsar.evaluation.logits import BATCH_BYTES, EpisodeVideos, Matching, by_pairs, episode_logits, table_pays
from fsar.methods import METHODS, Embedding, FewShotMethod, create_method
from fsar.trunks import Features
from pipelines.episodes.stream import Chosen

CHANNELS, FRAMES, VIDEOS, WAY = 16, 6, 24, 3
OPTIONS = {"molo": {"heads": 4}, "hyrsm": {"heads": 4}, "hyrsm++": {"heads": 4}, "clip-fsar": {"heads": 4}}
CASES = [
    *((name, {}) for name in METHODS),
    ("molo", {"metric": "otam"}),
    ("hyrsm", {"support_merge": "video"}),
    ("clip-fsar", {"support_merge": "prototype"}),
    ("clip-fsar", {"inference": "combined"}),
    ("otam", {"support_merge": "prototype"}),
    ("prototype", {"metric": "euclidean", "temperature": None}),
    ("ctx", {"metric": "euclidean"}),
]
every = pytest.mark.parametrize(("name", "options"), CASES)


@pytest.fixture
def batching(monkeypatch):
    """Every method matches many episodes at a time, as on a GPU."""
    monkeypatch.setattr("fsar.evaluation.logits.ALONE_ON_CPU", ())


def model_and_embedding(name: str, options: dict) -> tuple[FewShotMethod, Embedding]:
    torch.manual_seed(0)
    model = create_method(name, trunk=None, channels=CHANNELS, frames=FRAMES, **OPTIONS.get(name, {}), **options).eval()
    maps = torch.randn(VIDEOS, FRAMES, CHANNELS, 5, 5).relu()
    with torch.no_grad():
        return model, model.embed(Features(maps, maps.mean(dim=(3, 4))))


def drawn(episodes: int, *, shot: int, unlabelled: int = 0) -> EpisodeVideos:
    """Video v is of class v % 6."""
    rng, chosen = np.random.default_rng(1), []
    for _ in range(episodes):
        classes = rng.choice(6, WAY, replace=False)
        places = np.stack([rng.permutation(VIDEOS // 6) for _ in classes]) * 6 + classes[:, None]
        query = [(int(row), label) for label in range(WAY) for row in places[label, shot : shot + 2]]
        rng.shuffle(query)
        more = rng.choice(VIDEOS, unlabelled, replace=False)
        support = places[:, :shot].ravel()
        chosen.append(Chosen(*(tuple(map(int, part)) for part in (classes, support)), tuple(query), tuple(more)))
    return EpisodeVideos.of(chosen, unlabelled=unlabelled > 0)


def one_by_one(
    model: FewShotMethod, embedding: Embedding, episodes: EpisodeVideos, texts: torch.Tensor
) -> torch.Tensor:
    def pick(places):
        return embedding.map(lambda x: x[torch.from_numpy(places)])

    with torch.no_grad():
        return torch.stack([
            model.match(
                pick(episodes.support[n]),
                pick(episodes.query[n]),
                class_text=texts[torch.from_numpy(episodes.classes[n])] if "class_text" in model.reads else None,
                unlabelled=pick(episodes.unlabelled[n]) if episodes.unlabelled.size else None,
            )
            for n in range(len(episodes))
        ])  # fmt: skip


@every
@pytest.mark.parametrize("shot", [1, 2])
@pytest.mark.usefixtures("batching")
def test_both_ways_give_the_logits_of_one_episode_at_a_time(name, options, shot):
    model, embedding = model_and_embedding(name, options)
    texts, episodes = torch.randn(6, CHANNELS), drawn(7, shot=shot)
    expected = one_by_one(model, embedding, episodes, texts)
    matching = Matching(model, embedding, texts.__getitem__ if "class_text" in model.reads else None, "fp32")
    batched = torch.cat(list(matching.in_batches(episodes)))
    torch.testing.assert_close(batched, expected, rtol=1e-4, atol=1e-4)
    if by_pairs(model, shot):
        looked_up = torch.cat(list(matching.from_table(episodes)))
        torch.testing.assert_close(looked_up, expected, rtol=1e-4, atol=1e-4)


@every
def test_what_is_said_to_need_pairs_alone_needs_them_alone(name, options):
    """A logit changes with no other class, and is the mean over the class's videos."""
    model, embedding = model_and_embedding(name, options)
    own, others = drawn(1, shot=2), torch.randn(6, CHANNELS)
    if not by_pairs(model, 2):
        return
    logits = one_by_one(model, embedding, own, others)
    single = [one_by_one(model, embedding, EpisodeVideos(*part), others) for part in _shots(own)]
    torch.testing.assert_close(torch.stack(single).mean(dim=0), logits, rtol=1e-4, atol=1e-4)


def _shots(episodes: EpisodeVideos) -> list[tuple]:
    rest = (episodes.query, episodes.labels, episodes.unlabelled)
    return [(episodes.classes, episodes.support[:, :, i : i + 1], *rest) for i in range(2)]


@pytest.mark.parametrize("merge", ["prototype", "video"])
@pytest.mark.usefixtures("batching")
def test_unlabelled_videos_go_along_and_what_cannot_be_batched_goes_one_by_one(merge, monkeypatch):
    options = {"support_merge": merge, "semi_threshold": 0.35}
    model, embedding = model_and_embedding("hyrsm++", options)
    episodes, texts = drawn(6, shot=2, unlabelled=4), torch.zeros(6, 1)
    sizes, match_batch = [], Matching.match_batch
    monkeypatch.setattr(Matching, "match_batch", lambda self, part: sizes.append(len(part)) or match_batch(self, part))
    logits = torch.cat(list(episode_logits(model, embedding, episodes)))
    expected = one_by_one(model, embedding, episodes, texts)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, one_by_one(model, embedding, drawn(6, shot=2), texts), atol=1e-3)
    # The shapes of single accepted videos depend on values: the batch that is tried fails.
    assert sizes == ([6] if merge == "prototype" else [6] + [1] * 6)


def test_batches_keep_within_the_memory_given(monkeypatch):
    model, embedding = model_and_embedding("molo", {})
    episodes = drawn(7, shot=1)
    videos = WAY + 2 * WAY
    monkeypatch.setitem(BATCH_BYTES, "cpu", 3 * videos * (2 * FRAMES - 1) * CHANNELS * 4)
    matching = Matching(model, embedding, None, "fp32")
    assert [len(logits) for logits in matching.in_batches(episodes)] == [3, 3, 1]


@pytest.mark.parametrize(("name", "batches"), [("hyrsm", 3), ("molo", 1)])
def test_a_method_that_is_faster_one_by_one_on_a_cpu_goes_one_by_one_there(name, batches):
    model, embedding = model_and_embedding(name, {})
    assert len(list(Matching(model, embedding, None, "fp32").in_batches(drawn(3, shot=1)))) == batches


def test_a_table_is_made_where_it_needs_fewer_pairs():
    model = model_and_embedding("otam", {})[0]
    assert table_pays(model, drawn(200, shot=2))
    assert not table_pays(model, drawn(2, shot=2))
    assert not table_pays(model_and_embedding("molo", {})[0], drawn(200, shot=2))
