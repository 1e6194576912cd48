"""Episodes, trunks, methods and the import of weights."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from golden_case import GOLDEN

from fsar.checkpoints import reference_names
from fsar.episode import Episode
from fsar.methods import METHODS, Embedding, FewShotMethod, create_method, method_options
from fsar.methods.molo import local
from fsar.trunks import Features, create_trunk
from shards_spec.errors import ConfigError

OF_FRAMES = [name for name, method in METHODS.items() if method.only_stream != "motion"]
TINY = {"trunk": "tiny", "num_classes": 6}


def make_episode(*, way=3, shot=2, queries=4, frames=4, size=32, seed=0, **more) -> Episode:
    generator = torch.Generator().manual_seed(seed)
    fields = {
        "support": torch.randn(way, shot, frames, 3, size, size, generator=generator),
        "query": torch.randn(queries, frames, 3, size, size, generator=generator),
        "query_labels": torch.arange(queries) % way,
        "class_ids": torch.arange(way),
        "base_ids": torch.arange(way),
    }
    return Episode(**(fields | more))


def make_model(name="molo", *, seed=0, **options) -> FewShotMethod:
    torch.manual_seed(seed)
    usual = {key: value for key, value in (TINY | {"dropout": False}).items() if key in method_options(name)}
    if name == "prototype":  # class means and a learned scale: the variant that can be fitted
        usual |= {"support_merge": "prototype", "temperature": None}
    return create_method(name, **(usual | options))


# Episodes


def test_episode_of_features_needs_no_images():
    maps = torch.zeros(3, 2, 4, 8, 5, 5)
    episode = make_episode(support=None, query=None, support_features=maps, query_features=torch.zeros(4, 4, 8, 5, 5))
    assert (episode.way, episode.shot) == (3, 2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"query": torch.zeros(4, 4, 3, 16, 16)}, "with equal rest"),
        ({"query": torch.zeros(5, 4, 3, 32, 32)}, "4 query_labels"),
        ({"query": None}, "or neither"),
        ({"support": None, "query": None}, "no images, features or motion"),
        ({"base_ids": torch.zeros(2, dtype=torch.int64)}, "2 base_ids"),
        ({"class_ids": torch.zeros(3)}, "vector of int64"),
        ({"query_labels": torch.tensor([0, 1, 2, 3])}, "range 0 to 2"),
        ({"support": torch.zeros(3, 2, 4, 1, 9, 9), "query": torch.zeros(4, 4, 1, 9, 9)}, "3, H, W"),
        ({"support_features": torch.zeros(3, 1, 4, 8), "query_features": torch.zeros(4, 4, 8)}, "1 shots"),
        ({"support_mask": torch.ones(3, 2)}, "it must be bool"),
        ({"support_mask": torch.tensor([[True, True], [False, False], [True, True]])}, "class 1 without"),
        ({"class_text": torch.zeros(2, 8)}, "class_text has 2 rows"),
    ],
)
def test_episode_says_what_does_not_fit(change, says):
    with pytest.raises(ConfigError, match=says):
        make_episode(**change)


def test_grouping_is_undone_and_padding_never_seen():
    mask = torch.tensor([[True, False, False], [True, True, True], [True, False, True]])
    episode = make_episode(shot=3, support_mask=mask)
    videos = episode.ungroup(episode.support)
    assert videos.shape[0] == 6
    assert episode.support_labels().tolist() == [0, 1, 1, 1, 2, 2]
    regrouped = episode.group(videos)
    assert torch.equal(regrouped[mask], episode.support[mask])
    assert not regrouped[~mask].any()


def test_episode_moves_but_its_mask_stays():
    episode = make_episode(support_mask=torch.ones(3, 2, dtype=torch.bool)).to("meta")
    assert episode.support.is_meta
    assert episode.support_mask.device.type == "cpu"


# Trunks


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_has_the_published_names_and_shapes(name):
    shapes = json.loads((GOLDEN / "state_dicts" / f"trunk_{name}.json").read_text())
    with torch.device("meta"):
        trunk = create_trunk(name)
        model = create_method("prototype", trunk=name)
    official = reference_names(model)
    ours = {official[key]: list(value.shape) for key, value in model.state_dict().items() if key.startswith("trunk.")}
    assert ours == shapes
    assert {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer2.0.downsample.0.weight"} < set(
        trunk.state_dict()
    )


@pytest.mark.parametrize(("name", "channels", "maps"), [("resnet34", 512, 2), ("resnet18", 512, 2), ("tiny", 128, 8)])
def test_trunk_shapes(name, channels, maps):
    trunk = create_trunk(name).eval()
    with torch.no_grad():
        features = trunk(torch.randn(2, 3, 3, 64, 64))
    assert features.maps.shape == (2, 3, channels, maps, maps)
    assert features.pooled.shape == (2, 3, channels)
    assert trunk.channels == channels


def test_tiny_keeps_place_and_resnet_does_not():
    maps = torch.zeros(1, 128, 8, 8)
    maps[..., 0, 0] = 1
    tiny = create_trunk("tiny")
    assert not torch.allclose(tiny.pool(maps), tiny.pool(maps.flip(-1)))
    with torch.device("meta"):
        resnet = create_trunk("resnet18")
    assert torch.equal(resnet.pool(maps), resnet.pool(maps.flip(-1)))


# The registry


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("mollo", {}, 'did you mean "molo"'),
        ("molo", {"trunk": "resnet5"}, 'did you mean "resnet50"'),
        ("molo", {"recon_weight": 1}, 'did you mean "recons_weight"'),
        ("molo", {"trunk": None}, "needs the option channels"),
        ("molo", {"trunk": "tiny", "channels": 64}, "does not fit the trunk"),
        ("molo", {"trunk": "tiny", "heads": 7}, "does not divide"),
        ("molo", {"trunk": "tiny", "reduction": "max"}, "choose"),
        ("prototype", {"trunk": "tiny", "metric": "manhattan"}, "choose"),
        ("nowhere.to.find:Thing", {}, "cannot be imported"),
        ("fsar.episode:Episode", {}, "not a FewShotMethod"),
    ],
)
def test_unknown_names(name, options, says):
    with pytest.raises(ConfigError, match=says):
        create_method(name, **options)


def test_a_class_of_ones_own():
    model = create_method("fsar.methods.prototype:Prototype", trunk="tiny")
    assert isinstance(model, METHODS["prototype"])
    assert method_options("molo")["position_scale"] == (10.0, 1.0)


# What all methods share


@pytest.mark.parametrize("name", OF_FRAMES)
def test_embeddings_matched_alone_give_the_same_logits(name):
    model, episode = make_model(name).eval(), make_episode()
    with torch.no_grad():
        whole = model(episode).logits
        alone = [model.embed(model.trunk(video[None])) for video in episode.support.flatten(0, 1)]
        query = model.embed(model.trunk(episode.query))
        parts = [embedding.tokens for embedding in alone], [embedding.motion for embedding in alone]
        support = type(query)(torch.cat(parts[0]), None if query.motion is None else torch.cat(parts[1]))
        logits = model.match(support.map(lambda x: x.unflatten(0, (3, 2))), query)
    torch.testing.assert_close(logits, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", OF_FRAMES)
def test_logits_do_not_depend_on_labels_or_on_other_queries(name):
    model, episode = make_model(name).eval(), make_episode()
    with torch.no_grad():
        logits = model(episode).logits
        changed = replace(
            episode,
            query=episode.query[:2],
            query_labels=episode.query_labels[:2].flip(0),
            base_ids=torch.tensor([5, 4, -1]),
        )
        torch.testing.assert_close(model(changed).logits, logits[:2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{"classification_weight": 0.5}, {}])
@pytest.mark.parametrize("name", ["molo", "prototype"])
def test_unequal_shots_equal_the_ragged_list(name, options):
    """Padding of large numbers changes no loss, gradient or running statistic."""
    mask = torch.tensor([[True, False, False], [True, True, True], [True, False, True]])
    episode = make_episode(shot=3, support_mask=mask)
    episode.support[~mask] = 1e4
    padded = make_model(name, **options)
    ragged = copy.deepcopy(padded)
    padded(episode).loss.backward()

    losses = ragged_losses(ragged, episode, mask)
    losses.backward()
    for (key, ours), other in zip(padded.named_buffers(), ragged.buffers(), strict=True):  # trunk and decoder
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6, msg=key)
    torch.testing.assert_close(padded(episode).loss, losses, rtol=1e-5, atol=1e-6)
    for (key, ours), other in zip(padded.named_parameters(), ragged.parameters(), strict=True):
        if other.grad is None:
            assert ours.grad is None, key
        else:
            torch.testing.assert_close(ours.grad, other.grad, rtol=1e-3, atol=1e-5, msg=key)


def ragged_losses(model, episode, mask):
    """The loss of an episode of unequal shots, computed from a list of videos class by class."""
    ones = [[episode.support[c, s] for s in range(mask.shape[1]) if mask[c, s]] for c in range(len(mask))]
    videos = torch.stack([video for row in ones for video in row])
    labels = torch.tensor([c for c, row in enumerate(ones) for _ in row])
    support_features, query_features = model.trunk(videos), model.trunk(episode.query)
    embed = (lambda features: model.encode(features)[0]) if hasattr(model, "encode") else model.embed
    support, query = embed(support_features), embed(query_features)
    cross_entropy = torch.nn.functional.cross_entropy
    means = support.map(lambda x: torch.stack([x[labels == c].mean(0) for c in range(len(ones))]))
    matched = (means, query) if query.motion is None else (local(means), local(query))
    loss = cross_entropy(model.match(matched[0].map(lambda x: x[:, None]), matched[1]), episode.query_labels)
    targets = torch.cat([labels, episode.query_labels])
    if model.weights["class"]:
        both = [support.tokens, query.tokens]
        if query.motion is None:
            logits = model.classifier(torch.cat(both))
        else:
            motion = torch.cat([support.motion, query.motion]).mean(1)
            logits = model.classifier(torch.cat(both).mean(1) + motion)
        loss = loss + model.weights["class"] * cross_entropy(logits, targets)
    if query.motion is not None:
        contrast = model.contrastive_logits(means, query)
        loss = loss + 0.05 * sum(cross_entropy(value, episode.query_labels) for value in contrast.values())
        maps = torch.cat([model.motion.differences(f.maps) for f in (support_features, query_features)])
        decoded = model.decoder(maps.flatten(0, 1), (32, 32))
        images = torch.cat([videos, episode.query])
        target = images[:, 1:] - images[:, :-1]
        loss = loss + 0.4 * (decoded - target.flatten(0, 1)).square().mean()
    return loss


def test_running_statistics_of_unequal_shots():
    mask = torch.tensor([[True, False], [True, True]])
    episode = make_episode(way=2, support_mask=mask)
    episode.support[~mask] = 1e4
    model = make_model("prototype")
    trunk = copy.deepcopy(model.trunk)
    model(episode)
    trunk(episode.support[mask])
    trunk(episode.query)
    for ours, other in zip(model.trunk.buffers(), trunk.buffers(), strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("name", [name for name in METHODS if "num_classes" in method_options(name)])
def test_novel_classes_have_no_auxiliary_term(name):
    model = make_model(name, classification_weight=0.5)
    output = model(make_episode(base_ids=torch.full((3,), -1)))
    assert output.losses["class"].item() == 0
    assert torch.isfinite(output.loss)
    some = model(make_episode(base_ids=torch.tensor([1, -1, -1])))
    assert some.losses["class"] > 0
    with pytest.raises(ConfigError, match="num_classes=6"):
        model(make_episode(base_ids=torch.tensor([1, 2, 6])))


@pytest.mark.parametrize("name", OF_FRAMES)
def test_matching_stays_in_float32_under_autocast(name):
    model, episode = make_model(name), make_episode()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(episode)
    assert output.logits.dtype == output.loss.dtype == torch.float32
    assert all(term.dtype == torch.float32 for term in output.losses.values())
    output.loss.backward()


def test_texts_are_refused_by_methods_that_do_not_read_them():
    model = make_model("prototype")
    embedding = model.embed(Features(None, torch.zeros(4, 2, 128)))
    with pytest.raises(ConfigError, match="neither class texts"):
        model.match(embedding.map(lambda x: x[:, None]), embedding, class_text=torch.zeros(4, 8))


class Reader(FewShotMethod):
    """Notes what `match` gets."""

    def embed(self, features):
        return Embedding(features.pooled)

    def match(self, support, query, *, class_text, unlabelled, **_):
        self.got = class_text, None if unlabelled is None else unlabelled.tokens
        return query.tokens.mean((1, 2))[:, None].expand(-1, len(support.tokens))


@pytest.mark.parametrize(("texts", "unlabelled"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_method_of_ones_own_gets_what_it_says_it_reads(monkeypatch, texts, unlabelled):
    reads = {"class_text": texts, "unlabelled": unlabelled}
    monkeypatch.setattr(Reader, "reads", {name for name, read in reads.items() if read})
    model = Reader("tiny", channels=None, frames=4).eval()
    episode = make_episode(class_text=torch.randn(3, 5), unlabelled=torch.randn(2, 4, 3, 32, 32))
    model(episode)
    assert (model.got[0] is episode.class_text) if texts else (model.got[0] is None)
    assert (tuple(model.got[1].shape) == (2, 4, 128)) if unlabelled else (model.got[1] is None)
    if texts:
        model.set_base_text(torch.zeros(6, 5))
    else:
        with pytest.raises(ConfigError, match="Reader reads no class texts"):
            model.set_base_text(torch.zeros(6, 5))


def test_an_input_that_no_episode_has_is_refused(monkeypatch):
    monkeypatch.setattr(Reader, "reads", {"unlabeled"})
    with pytest.raises(ConfigError, match='reads="unlabeled" is not known; choose "maps" or'):
        Reader("tiny", channels=None, frames=4)


@pytest.mark.parametrize("former", ["reads_class_text", "by_pairs"])
def test_what_methods_of_ones_own_stated_before_is_refused(monkeypatch, former) -> None:
    monkeypatch.setattr(Reader, former, True, raising=False)
    with pytest.raises(ConfigError, match=rf"Reader\.{former} is no longer read: use "):
        Reader("tiny", channels=None, frames=4)


@pytest.mark.parametrize("name", OF_FRAMES)
def test_a_few_steps_lower_the_loss(name):
    model, episode = make_model(name), make_episode()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = model(episode).losses["ce"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# Prototype


@pytest.mark.parametrize(("metric", "sign"), [("cosine", 1), ("euclidean", -1)])
def test_prototype_by_hand(metric, sign):
    model = make_model("prototype", metric=metric, temperature=2.0).eval()
    assert not hasattr(model, "scale")
    support, query = torch.randn(3, 2, 4, 128), torch.randn(4, 4, 128)
    episode = make_episode(support=None, query=None, support_features=support, query_features=query)
    output = model(episode)
    prototypes, means = support.mean(dim=(1, 2)), query.mean(dim=1)
    if metric == "cosine":
        expected = 2 * torch.cosine_similarity(means[:, None], prototypes[None], dim=-1)
    else:
        expected = -2 * torch.cdist(means, prototypes) ** 2
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
    assert list(output.losses) == ["ce"]
    if metric == "euclidean":
        same = make_model("prototype", metric=metric, temperature=2.0, support_merge="video").eval()
        torch.testing.assert_close(same(episode).logits, output.logits)


def test_prototype_has_nothing_to_learn_unless_asked():
    assert list(create_method("prototype", trunk=None, channels=2048).parameters()) == []
    for temperature in (None, 0.0):
        (scale,) = create_method("prototype", trunk=None, channels=8, temperature=temperature).parameters()
        assert scale.item() == 10
