"""HyRSM and HyRSM++ against outputs of the reference code (alibaba-mmai-research/HyRSMPlusPlus)."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from golden_case import HeadCase, fill, official_state_dict

from fsar.checkpoints import load_reference_state_dict, reference_names
from fsar.episode import Episode
from fsar.matching import cosine_distance, set_distance
from fsar.methods import Embedding, create_method
from fsar.methods.hyrsmpp import temporal_incoherence
from shards_spec.errors import ConfigError

METHODS = {"hyrsm": "hyrsm", "hyrsmpp": "hyrsm++"}
CASES = [  # neighbours share their weights
    ("hyrsm", "hyrsm_1shot"),
    ("hyrsm", "hyrsm_class5_shot1"),
    ("hyrsm", "hyrsm_5shot"),
    ("hyrsmpp", "hyrsmpp_1shot"),
    ("hyrsmpp", "hyrsmpp_5shot"),
    ("hyrsm", "hyrsm_class1_shot5"),
    ("hyrsmpp", "hyrsmpp_class1_shot5"),
    ("hyrsmpp", "hyrsmpp_hmdb_3shot"),
    ("hyrsmpp", "hyrsmpp_epic_5shot"),
    ("hyrsmpp", "hyrsmpp_semi_nounlabel_5shot"),
    ("hyrsmpp", "hyrsmpp_semi_1shot"),
    ("hyrsmpp", "hyrsmpp_r18_T16_1shot"),
    ("hyrsm", "hyrsm_img_r18_1shot"),
    ("hyrsmpp", "hyrsmpp_img_r18_1shot"),
]
TERMS = {"ce": "match", "class": "class", "temporal": "temporal"}  # our names -> those of the files


def close(value, expected, *, absolute=0.0, relative=0.0) -> None:
    value = value.detach().numpy() if isinstance(value, torch.Tensor) else value
    np.testing.assert_allclose(value, expected, atol=absolute, rtol=relative)


def options_of(case: HeadCase) -> dict[str, object]:
    """The options of create_method that stand for the reference's class and configuration."""
    given = case.train_options
    options = case.options | {
        "num_classes": case.num_classes,
        "position_scale": (given.get("POSITION_A", 10.0), given.get("POSITION_B", 1.0)),
        "support_merge": "video" if case.settings["head"].endswith("1shot") else "prototype",
        "classification_weight": given["USE_CLASSIFICATION_VALUE"],
        "dropout": False,
    }
    if "WINDOW_SIZE" in given:
        options |= {
            "window": given["WINDOW_SIZE"],
            "temporal_balance": given["TEMPORAL_BALANCE"],
            "outside_weight": given["BALANCE_COEFFICIENT"],
            "temporal_weight": given["TEMPORAL_LOSS_WEIGHT"],
        }
    if "SEMI_THRESHOLD" in given:
        options |= {"semi_temperature": given["SEMI_TEMPORAL"], "semi_threshold": given["SEMI_THRESHOLD"]}
    return options


@lru_cache(maxsize=1)
def weights(seed: int, num_classes: int, trunk: str | None, width: int) -> dict[str, torch.Tensor]:
    shapes = {"seed": seed, "num_classes": num_classes, "trunk": trunk, "width": width}
    return official_state_dict(head="hyrsm", **shapes)


@lru_cache(maxsize=11)
def probe(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The vector [n] whose product with a gradient the files hold."""
    return torch.from_numpy(fill.normal(f"probe:{name}", shape, seed)).flatten()


class Run:
    """A case put through the public interface once in each mode; the tests look at what came out."""

    def __init__(self, folder: str, name: str) -> None:
        self.case = case = HeadCase(folder, name)
        self.model = create_method(METHODS[folder], **options_of(case))
        values = weights(case.settings["seed"], case.num_classes, case.trunk, case.width)
        load_reference_state_dict(self.model, {f"head.{key}": value for key, value in values.items()})
        self.episode = case.episode()
        self.fused = []
        fuse = self.model.fuse
        self.model.fuse = lambda *tokens: self.fused.append(fuse(*tokens)) or self.fused[-1]
        with torch.no_grad():
            self.eval_output = self.model.eval()(self.episode)
            self.eval_fused = self.fused[-1]
            support, query = (self.model.embed(features) for features in self.model.read(self.episode))
            given = {}
            if self.episode.unlabelled_features is not None:
                given["unlabelled"] = self.model.embed(self.model.read_unlabelled(self.episode))
            self.matched = self.model.match(support.map(self.episode.group), query, **given)
        if not case.starts_from_images:
            self.episode.support_features.requires_grad_()
            self.episode.query_features.requires_grad_()
        self.train_output = self.model.train()(self.episode)
        self.train_output.loss.backward()

    def tolerance(self, *, training: bool) -> dict[str, float]:
        if not self.case.starts_from_images:
            return {"absolute": 2e-5, "relative": 1e-5}
        return dict.fromkeys(("absolute", "relative"), 1e-3 if training else 1e-4)

    def gradients(self) -> dict[str, torch.Tensor]:
        """By official name; those of the inputs as [V * T, C] in the reference's order."""
        names = reference_names(self.model)
        found = {names[name]: parameter.grad for name, parameter in self.model.named_parameters()}
        if not self.case.starts_from_images:
            support = self.case.in_reference_order(self.episode.support_features.grad)
            query = self.episode.query_features.grad
            found |= {"input.support": support.flatten(0, 1), "input.query": query.flatten(0, 1)}
        return found


@pytest.fixture(scope="module", params=CASES, ids=[name for _, name in CASES])
def run(request) -> Run:
    return Run(*request.param)


def test_inputs_are_those_of_the_files(run):
    for name in ("support", "query"):
        labels = run.case.labels(name)
        assert labels.tolist() == run.case.outputs[f"{name}_labels"].tolist()
        assert run.case.base_ids[labels].tolist() == run.case.outputs[f"real_{name}_labels"].tolist()


def test_eval_mode(run):
    expected, tolerance = run.case.outputs, run.tolerance(training=False)
    close(run.eval_output.logits, expected["eval_logits"], **tolerance)
    frames = expected["eval_class_logits_first4"].reshape(-1, run.case.settings["frames"], 4)
    close(run.eval_output.aux["class"][..., :4], run.case.in_our_order(frames), **tolerance)
    assert ("temporal" in run.eval_output.losses) == ("eval_temporal_reg" in expected)
    if "eval_temporal_reg" in expected:
        close(run.eval_output.losses["temporal"], expected["eval_temporal_reg"], **tolerance)


def test_fused_features(run):
    members, queries = run.eval_fused
    expected, tolerance = run.case.outputs, run.tolerance(training=False)
    sample = expected["eval_support_feat_sample"]  # [2, S, T, 4]
    sample = sample[:, run.case.order] if run.model.support_merge == "video" else sample
    close(members[:2, ..., :4], sample, **tolerance)
    close(queries[:2, ..., :4], expected["eval_query_feat_sample"], **tolerance)


def test_match_alone(run):
    close(run.matched, run.case.outputs["eval_logits"], **run.tolerance(training=False))


def test_pseudo_labels(run):
    expected = run.case.outputs
    assert ("pseudo" in run.eval_output.aux) == ("eval_pseudo_prob" in expected)
    if "pseudo" in run.eval_output.aux:
        probability = run.eval_output.aux["pseudo"]
        close(probability, expected["eval_pseudo_prob"], absolute=1e-4)
        accepted = (probability.max(1).values >= run.model.semi_threshold).nonzero().squeeze(1)
        assert accepted.tolist() == expected["eval_pseudo_index"].tolist()


def test_train_mode(run):
    expected, tolerance = run.case.outputs, run.tolerance(training=True)
    close(run.train_output.logits, expected["train_logits"], **tolerance)
    for name, value in run.train_output.losses.items():
        close(value, expected[f"train_loss_{TERMS[name]}"], **tolerance)
    close(run.train_output.loss, expected["train_loss_total"], **tolerance)


def test_gradients(run):
    names, found, expected = run.case.settings["gradient_names"], run.gradients(), run.case.outputs
    norms = [float(found[name].double().norm()) for name in names]
    if run.case.starts_from_images:  # float32 says nothing about their probes
        close(norms, expected["grad_norm"], relative=2e-2)
        return
    close(norms, expected["grad_norm"], relative=1e-4, absolute=1e-6)
    seed = run.case.settings["seed"]
    probes = [float(found[name].flatten() @ probe(name, tuple(found[name].shape), seed)) for name in names]
    close(probes, expected["grad_probe"], absolute=1e-4 * np.abs(expected["grad_probe"]).max())


# Without golden files


def make_model(name="hyrsm++", **options):
    torch.manual_seed(0)
    return create_method(name, **({"trunk": None, "channels": 16, "num_classes": 6, "dropout": False} | options))


def make_episode(*, way=3, shot=3, queries=4, frames=4, channels=16, mask=None) -> Episode:
    generator = torch.Generator().manual_seed(1)
    return Episode(
        support=None,
        query=None,
        query_labels=torch.arange(queries) % way,
        class_ids=torch.arange(way),
        base_ids=torch.arange(way),
        support_mask=mask,
        support_features=torch.rand(way, shot, frames, channels, generator=generator),
        query_features=torch.rand(queries, frames, channels, generator=generator),
    )


def by_definition(model, episode, mask):
    """Loss of an episode from its list of videos, query by query and without the cheaper order of computation."""
    counts = mask.sum(dim=1).tolist()
    inputs = episode.support_features[mask], episode.query_features
    support, query = (model.transformer(model.position(features)) for features in inputs)
    members = list(support)
    if model.support_merge == "prototype":
        members = [part.mean(0) for part in support.split(counts)]
    logits, maps, query_maps = [], [], []
    for video in query:
        videos = torch.stack([*members, video])  # [S+1, T, C]
        relations = relate(model.relation, videos.mean(1))
        both = torch.cat([videos, relations[:, None].expand_as(videos)], dim=2)
        fused = torch.nn.functional.linear(both, model.fusion.weight[..., 0], model.fusion.bias)
        distances = torch.stack([hausdorff(one, fused[-1]) for one in fused[:-1]])
        per_class = [1] * len(counts) if model.support_merge == "prototype" else counts
        logits.append(-torch.stack([part.mean() for part in distances.split(per_class)]))
        maps.append(fused[:-1])
        query_maps.append(fused[-1])
    labels = torch.cat([torch.arange(len(counts)).repeat_interleave(mask.sum(dim=1)), episode.query_labels])
    frames = query.shape[1]
    class_logits = model.classifier(torch.cat([support, query])).flatten(0, 1)
    cross_entropy = torch.nn.functional.cross_entropy
    loss = cross_entropy(torch.stack(logits), episode.query_labels)
    loss = loss + 0.1 * cross_entropy(class_logits, episode.base_ids[labels].repeat_interleave(frames))
    for videos in (torch.cat(maps), torch.stack(query_maps)):
        loss = loss + 0.1 * temporal_incoherence(videos, window=3, balance=23.0, outside_weight=10.0)
    return loss


def relate(relation, tokens):
    """[n, C] -> [n, C]: torch's own attention with the weights of ours."""
    q, k, v = (
        project(tokens).unflatten(1, (relation.heads, -1)) for project in (relation.query, relation.key, relation.value)
    )
    scores = torch.einsum("i h c, j h c -> h i j", q, k) / q.shape[-1] ** 0.5
    attended = torch.einsum("h i j, j h c -> i h c", scores.softmax(-1), v).flatten(1)
    return relation.norm(tokens + relation.output(attended)).relu()


def hausdorff(a, b):
    distance = 1 - torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)
    return distance.min(1).values.sum() + distance.min(0).values.sum()


@pytest.mark.parametrize("support_merge", ["prototype", "video"])
def test_unequal_shots_equal_the_ragged_list(support_merge):
    """Padding that is not a number changes neither loss nor gradients."""
    mask = torch.tensor([[True, False, False], [True, True, True], [True, False, True]])
    episode = make_episode(mask=mask, frames=6)
    episode.support_features[~mask] = float("nan")
    model = make_model(support_merge=support_merge)
    other = copy.deepcopy(model)
    loss, expected = model(episode).loss, by_definition(other, episode, mask)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    for (key, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("support_merge", ["prototype", "video"])
@pytest.mark.parametrize("name", ["hyrsm", "hyrsm++"])
def test_one_frame(name, support_merge):
    output = make_model(name, support_merge=support_merge, frames=1)(make_episode(frames=1))
    assert torch.isfinite(output.loss)
    assert "temporal" not in output.losses or output.losses["temporal"].item() == pytest.approx(0, abs=1e-6)


def test_merging_makes_no_difference_with_one_shot():
    episode = make_episode(shot=1)
    one, other = (make_model(support_merge=merge).eval()(episode) for merge in ("prototype", "video"))
    torch.testing.assert_close(one.logits, other.logits)
    torch.testing.assert_close(one.loss, other.loss)


def test_queries_do_not_see_each_other():
    model, episode = make_model("hyrsm").eval(), make_episode()
    alone = replace(episode, query_features=episode.query_features[2:3], query_labels=episode.query_labels[2:3])
    torch.testing.assert_close(model(alone).logits, model(episode).logits[2:3])


def test_set_distance_of_unequal_lengths():
    generator = torch.Generator().manual_seed(2)
    query, members = torch.randn(2, 3, 8, generator=generator), torch.randn(2, 4, 5, 8, generator=generator)
    total, mean = (set_distance(query, members, reduction=reduction) for reduction in ("sum", "mean"))
    for q in range(2):
        for s in range(4):
            torch.testing.assert_close(total[q, s], hausdorff(members[q, s], query[q]))
            distance = cosine_distance(members[q, s : s + 1], query[q : q + 1])[0]
            torch.testing.assert_close(mean[q, s], distance.amin(1).mean() + distance.amin(0).mean())


def test_temporal_incoherence_by_hand():
    """Four equal frames have no distance: each pair outside the window costs the whole margin."""
    videos = torch.ones(1, 4, 8)
    margins = [1 - np.exp(-1 / 23), 1 - np.exp(-4 / 23)]  # 2 and 3 steps apart
    expected = 10 * (4 * margins[0] + 2 * margins[1]) / 16
    close(temporal_incoherence(videos, window=1, balance=23.0, outside_weight=10.0), expected, relative=1e-4)
    orthogonal = torch.eye(4)[None]
    expected = (6 / 2 + 4 / 5 + 2 / 10) / 16
    close(temporal_incoherence(orthogonal, window=3, balance=23.0, outside_weight=10.0), expected, relative=1e-5)


# Unlabelled videos


def semi_episode(unlabelled) -> Episode:
    return replace(make_episode(), unlabelled_features=unlabelled)


@pytest.mark.parametrize("support_merge", ["prototype", "video"])
def test_an_accepted_video_is_one_more_shot_with_gradient(support_merge):
    """Also where it stands at place 0 alone, which the published code drops."""
    whole = make_episode(shot=2)
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    extra = whole.support_features[1, 1:].clone().requires_grad_()
    model = make_model(support_merge=support_merge, semi_temperature=1e-3, semi_threshold=0.5).eval()
    episode = replace(whole, support_mask=mask, unlabelled_features=extra)
    output = model(episode)
    label = int(output.aux["pseudo"].argmax())
    mask = torch.cat([mask, torch.zeros(3, 1, dtype=torch.bool)], dim=1)
    mask[label, 2] = True
    features = torch.cat([whole.support_features, extra.detach().expand(3, 1, -1, -1)], dim=1)
    expected = model(replace(whole, support_mask=mask, support_features=features))
    torch.testing.assert_close(output.logits, expected.logits)
    output.loss.backward()
    assert extra.grad.abs().sum() > 0


def test_what_is_not_accepted_changes_nothing_and_has_no_gradient():
    extra = torch.rand(5, 4, 16, requires_grad=True)
    output = make_model(semi_threshold=1.0, semi_temperature=100.0)(semi_episode(extra))
    torch.testing.assert_close(output.logits, make_model()(make_episode()).logits)
    output.loss.backward()
    assert extra.grad is None or not extra.grad.any()


def test_pseudo_labels_take_no_gradient_away_under_autocast():
    model = make_model(semi_temperature=1e-3, semi_threshold=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(semi_episode(torch.rand(5, 4, 16))).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_other_methods_refuse_unlabelled_videos():
    model = make_model("hyrsm")
    tokens = Embedding(torch.rand(3, 2, 4, 16))
    with pytest.raises(ConfigError, match="neither class texts nor unlabelled videos"):
        model.match(tokens, Embedding(torch.rand(4, 4, 16)), unlabelled=Embedding(torch.rand(2, 4, 16)))


def test_dropout_acts_in_training_only():
    episode, model = make_episode(), make_model(dropout=True)
    assert not torch.equal(model(episode).logits, model(episode).logits)
    model.eval()
    assert torch.equal(model(episode).logits, model(episode).logits)


def test_matching_stays_in_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = make_model()(make_episode())
    assert {output.logits.dtype, output.loss.dtype, *(term.dtype for term in output.losses.values())} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("hyrsm", {"window": 3}, 'no option "window"'),
        ("hyrsm", {"support_merge": "shot"}, 'choose "prototype" or "video"'),
        ("hyrsm", {"reduction": "max"}, 'choose "sum" or "mean"'),
        ("hyrsm++", {"heads": 5}, "does not divide"),
        ("hyrsm++", {"semi_threshold": 1.5}, "a threshold between 0 and 1"),
        ("hyrsm++", {"temporal_balance": 0}, "a balance above 0"),
    ],
)
def test_options_that_do_not_fit(name, options, says):
    with pytest.raises(ConfigError, match=says):
        make_model(name, **options)
