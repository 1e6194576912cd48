"""OTAM, TRX, CTX and TSN against outputs of published code (alibaba-mmai-research/MoLo), and what holds of them."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from baseline_case import METHODS, BaselineCase
from golden_case import GOLDEN, fill
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fsar.checkpoints import load_reference_state_dict, reference_names
from fsar.episode import Episode
from fsar.matching import bi_mean_hausdorff, mean_hausdorff, otam, otam_both
from fsar.methods import create_method
from fsar.trunks import Features
from shards_spec.errors import ConfigError

CASES = [
    *itertools.product(("otam", "trx", "ctx", "tsn"), ("1shot", "5shot")),
    ("otam", "img_1shot"),
    ("otam", "img_r18_1shot"),
    ("trx", "img_r18_1shot"),
    ("ctx", "img_1shot"),
    ("tsn", "img_r18_1shot"),
]
METRICS_SEED = 31


def close(value, expected, *, absolute=0.0, relative=0.0) -> None:
    value = value.detach().numpy() if isinstance(value, torch.Tensor) else value
    np.testing.assert_allclose(value, expected, atol=absolute, rtol=relative)


# The published code


class Run:
    """A case put through the public interface in both modes; the tests look at what came out."""

    def __init__(self, folder: str, name: str) -> None:
        self.case = BaselineCase(folder, f"{folder}_{name}")
        self.model = create_method(self.case.method, **self.case.options)
        load_reference_state_dict(self.model, {f"head.{name}": value for name, value in self.case.weights().items()})
        self.episode = self.case.episode()
        with torch.no_grad():
            self.eval = self.model.eval()(self.episode)
        if not self.case.starts_from_images:
            self.episode.support_features.requires_grad_()
            self.episode.query_features.requires_grad_()
        self.train = self.model.train()(self.episode)
        self.train.loss.backward()

    def gradient(self, name: str) -> torch.Tensor:
        """Gradient by the reference's name; that of features is [videos * T, D]."""
        if name == "input.support":
            return self.case.in_reference_order(self.episode.support_features.grad).flatten(0, 1)
        if name == "input.query":
            return self.episode.query_features.grad.flatten(0, 1)
        name = "query_head.weight" if name == "key_head.weight" else name  # one tensor
        ours = {official: own for own, official in reference_names(self.model).items()}
        return self.model.get_parameter(ours[name]).grad


@pytest.fixture(scope="module", params=CASES, ids="_".join)
def run(request) -> Run:
    return Run(*request.param)


def test_inputs(run):
    close(run.case.labels("query"), run.case.outputs["query_labels"])
    close(run.case.labels("support"), run.case.outputs["support_labels"])


def test_logits(run):
    absolute = 5e-5 if run.case.folder == "trx" else 2e-5
    tolerances = {"absolute": absolute, "relative": 1e-5}
    images = run.case.starts_from_images
    close(
        run.eval.logits,
        run.case.outputs["eval_logits"],
        **({"absolute": 1e-4, "relative": 1e-4} if images else tolerances),
    )
    tolerances = {"absolute": 1e-3, "relative": 1e-3} if images else tolerances
    close(run.train.logits, run.case.outputs["train_logits"], **tolerances)
    assert list(run.train.losses) == ["ce"]
    close(run.train.losses["ce"], run.case.outputs["train_loss_match"], **tolerances)
    close(run.train.loss, run.case.outputs["train_loss_total"], **tolerances)


def test_gradients(run):
    names, images = run.case.settings["gradient_names"], run.case.starts_from_images
    gradients = [run.gradient(name) for name in names]
    norms = [gradient.double().norm() for gradient in gradients]
    close(np.array(norms), run.case.outputs["grad_norm"], relative=2e-2 if images else 1e-4, absolute=1e-6)
    if images:
        return  # rounding in BatchNorm leaves no more than the norm
    expected = run.case.outputs["grad_probe"]
    for name, gradient, value in zip(names, gradients, expected, strict=True):
        probe = torch.from_numpy(fill.normal(f"probe:{name}", tuple(gradient.shape), run.case.settings["seed"]))
        close((gradient.double() * probe).sum(), value, absolute=1e-4 * np.abs(expected).max())


def test_pure_metrics():
    with np.load(GOLDEN / "otam" / "metrics.npz") as stored:
        expected = dict(stored)
    compared = [check_metric(key, expected.get(f"{key}_f64", value)) for key, value in expected.items()]
    assert len(compared) > 200


def check_metric(key: str, expected: np.ndarray) -> None:
    if key.endswith("_f64"):
        return
    case, metric = key.split("/")
    bound, shape = case[1:].split("_")
    shape = tuple(int(size) for size in shape.split("x"))
    distance = torch.from_numpy(np.float32(bound) * fill.uniform(f"dist:{case}", shape, METRICS_SEED)).requires_grad_()
    value = pure_metric(distance, metric.removeprefix("grad_"))
    if metric.startswith("grad_"):
        probe = fill.normal(f"probe_out:{metric.removeprefix('grad_')}", shape[:2], METRICS_SEED)
        (value,) = torch.autograd.grad((value * torch.from_numpy(probe)).sum(), distance)
    close(value, expected, absolute=1e-5)


def pure_metric(distance: torch.Tensor, name: str) -> torch.Tensor:
    if name.startswith("mhm_sum"):
        return mean_hausdorff(distance, int(name[-1]))
    if name.startswith("bimhm"):
        return bi_mean_hausdorff(distance, reduction=name.removeprefix("bimhm_"))
    smoothing, direction = name.removeprefix("otam").split("_")
    if direction == "both":
        return otam_both(distance, float(smoothing))
    return otam(distance if direction == "q2s" else distance.mT, float(smoothing))


# What holds of the alignment


def plain_otam(distance: np.ndarray, smoothing: float) -> float:
    """The recursion cell by cell, in float64."""
    rows, columns = distance.shape
    padded = np.pad(distance, ((0, 0), (1, 1)))
    cost = np.zeros((rows, columns + 2))
    cost[0] = np.cumsum(padded[0])
    for row in range(1, rows):
        for column in range(1, columns + 2):
            moves = [cost[row - 1, column - 1], cost[row, column - 1]]
            if column in (1, columns + 1):
                moves.append(cost[row - 1, column])
            cost[row, column] = padded[row, column] - smoothing * np.logaddexp.reduce(-np.array(moves) / smoothing)
    return cost[-1, -1]


@st.composite
def distances(draw, most=6) -> torch.Tensor:
    rows, columns = draw(st.integers(1, most)), draw(st.integers(1, most))
    rank = st.sampled_from([0.0, 1.0, 2.0]) if draw(st.booleans()) else st.floats(0, 2)  # many ties, or few
    values = draw(st.lists(rank, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(values, dtype=torch.float64).reshape(rows, columns)


@settings(max_examples=60, deadline=None)
@given(distances(), st.sampled_from([0.05, 0.1, 0.5]))
def test_otam_is_the_plain_recursion(distance, smoothing):
    expected = plain_otam(distance.numpy(), smoothing)
    close(otam(distance, smoothing), expected, absolute=1e-9)
    close(otam(distance.expand(2, 3, -1, -1), smoothing), np.full((2, 3), expected), absolute=1e-9)
    both = expected + plain_otam(distance.numpy().T, smoothing)
    close(otam_both(distance, smoothing), both, absolute=1e-9)
    close(otam_both(distance.mT, smoothing), both, absolute=1e-9)


@settings(max_examples=15, deadline=None)
@given(distances(most=4), st.sampled_from([0.1, 0.5]))
def test_gradient_of_otam(distance, smoothing):
    assert torch.autograd.gradcheck(lambda d: otam_both(d, smoothing), distance.requires_grad_())


@pytest.mark.parametrize("shape", [(16, 16), (64, 64), (1, 64), (64, 1), (12, 40)])
def test_otam_stays_finite_where_exponentials_underflow(shape):
    random = 2 * torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    for distance in (random, torch.zeros(2, *shape), torch.full((2, *shape), 100.0)):
        distance = distance.requires_grad_()
        cost = otam_both(distance)
        cost.sum().backward()
        for row, value in zip(distance.detach().double().numpy(), cost, strict=True):
            close(value, plain_otam(row, 0.1) + plain_otam(row.T, 0.1), absolute=1e-4, relative=1e-5)
        assert torch.isfinite(distance.grad).all()


def test_costs_of_one_frame_and_of_one_row():
    distance = torch.tensor([[[0.25, 1.0, 0.5]]])
    close(otam(distance[..., :1]), [0.25])
    close(otam(distance), [1.75])
    # One column, two rows: enter at row 1 for nothing in two ways, or come down from row 0.
    entered = 1.0 - 0.1 * math.log(2 + math.exp(-2.5))
    expected = -0.1 * math.log(2 * math.exp(-2.5) + math.exp(-entered / 0.1))
    close(otam(distance[..., :2].mT), [expected], absolute=1e-6)


# What holds of each method

OWN = [("otam", {}), ("otam", {"support_merge": "prototype"}), ("otam", {"single_direction": True})]
OWN += [("trx", {"dropout": False}), ("trx", {"dropout": False, "tuple_sizes": (1, 4), "width": 64})]
OWN += [("ctx", {}), ("ctx", {"metric": "euclidean", "temperature": None}), ("prototype", METHODS["tsn"][1])]
own = pytest.mark.parametrize(("name", "options"), OWN)


def make_episode(*, way=3, shot=3, queries=4, frames=4, size=32, **more) -> Episode:
    generator = torch.Generator().manual_seed(0)
    fields = {
        "support": torch.randn(way, shot, frames, 3, size, size, generator=generator),
        "query": torch.randn(queries, frames, 3, size, size, generator=generator),
        "query_labels": torch.arange(queries) % way,
        "class_ids": torch.arange(way),
        "base_ids": torch.arange(way),
    }
    return Episode(**(fields | more))


def make_model(name, options):
    torch.manual_seed(0)
    return create_method(name, trunk="tiny", **options)


@own
def test_embeddings_matched_alone_give_the_same_logits(name, options):
    model, episode = make_model(name, options).eval(), make_episode()
    with torch.no_grad():
        alone = [model.embed(model.trunk(video[None])).tokens for video in episode.support.flatten(0, 1)]
        query = model.embed(model.trunk(episode.query))
        support = type(query)(torch.cat(alone).unflatten(0, (3, 3)))
        torch.testing.assert_close(model.match(support, query), model(episode).logits, atol=1e-4, rtol=1e-4)
        changed = replace(episode, query=episode.query[:2], query_labels=torch.tensor([2, 0]))
        torch.testing.assert_close(model(changed).logits, model(episode).logits[:2], atol=1e-4, rtol=1e-4)


@own
def test_unequal_shots_equal_the_ragged_list(name, options):
    """Padding of large numbers changes no loss, gradient or running statistic."""
    mask = torch.tensor([[True, False, False], [True, True, True], [True, False, True]])
    episode = make_episode(support_mask=mask)
    episode.support[~mask] = 1e4
    padded = make_model(name, options)
    ragged = copy.deepcopy(padded)
    output = padded(episode)
    output.loss.backward()
    support, query = ragged.embed(ragged.trunk(episode.support[mask])), ragged.embed(ragged.trunk(episode.query))
    classes = support.tokens.split(mask.sum(dim=1).tolist())
    columns = [ragged.match(type(support)(videos[None]), query) for videos in classes]
    loss = torch.nn.functional.cross_entropy(torch.cat(columns, dim=1), episode.query_labels)
    loss.backward()
    torch.testing.assert_close(output.loss, loss, rtol=1e-5, atol=1e-6)
    for (key, value), other in zip(padded.named_buffers(), ragged.buffers(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6, msg=key)
    for (key, value), other in zip(padded.named_parameters(), ragged.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(value.grad, other.grad, rtol=1e-3, atol=1e-5, msg=key)


@own
def test_matching_stays_in_float32_under_autocast(name, options):
    model, episode = make_model(name, options), make_episode()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(episode)
    assert output.logits.dtype == output.loss.dtype == torch.float32
    output.loss.backward()


@own
def test_a_few_steps_lower_the_loss(name, options):
    model, episode = make_model(name, options), make_episode(shot=1)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(8):
        output = model(episode)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append((output.loss.item(), output.logits.detach()))
    # Logits between -1 and 1 cannot fit; they must still move apart.
    assert losses[-1][0] < (0.95 if losses[0][1].abs().max() <= 1 else 0.5) * losses[0][0]


def test_trx_takes_any_number_of_frames():
    features = Features(None, torch.randn(4, 5, 8))
    models = [create_method("trx", trunk=None, channels=8, frames=frames, width=16).eval() for frames in (3, 5, 9)]
    logits = []
    for model in models:
        model.load_state_dict(models[0].state_dict())
        embedding = model.embed(features)
        logits.append(model.match(embedding.map(lambda x: x.unflatten(0, (2, 2))), embedding))
    torch.testing.assert_close(logits[1], logits[0])
    torch.testing.assert_close(logits[2], logits[0])


def test_ctx_has_one_tensor_under_two_names():
    model = create_method("ctx", trunk=None, channels=8, width=4)
    state = model.state_dict()
    assert list(state) == ["query_head.weight", "value_head.weight", "key_head.weight"]
    assert len(list(model.parameters())) == 2
    assert save(state)  # refuses tensors that share memory
    load_reference_state_dict(model, {name: torch.full_like(value, len(name)) for name, value in state.items()})
    assert model.state_dict()["key_head.weight"].unique().tolist() == [len("query_head.weight")]


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("otam", {"smoothing": 0.0}, "above 0"),
        ("otam", {"support_merge": "mean"}, "choose"),
        ("ctx", {"metric": "manhattan"}, "choose"),
        ("prototype", {"support_merge": "mean"}, "choose"),
        ("trx", {"tuple_sizes": ()}, "whole numbers"),
        ("trx", {"tuple_sizes": (2.5,)}, "whole numbers"),
        ("trx", {"tupel_sizes": (2,)}, 'did you mean "tuple_sizes"'),
    ],
)
def test_options_that_do_not_fit_are_refused(name, options, says):
    with pytest.raises(ConfigError, match=says):
        create_method(name, trunk="tiny", **options)


def test_trx_refuses_videos_shorter_than_its_tuples():
    model = create_method("trx", trunk=None, channels=8, width=16)
    with pytest.raises(ConfigError, match="tuples of 3 of 2 frames"):
        model.embed(Features(None, torch.zeros(4, 2, 8)))


def test_prototype_of_single_videos_by_hand():
    model = create_method("prototype", trunk=None, channels=2, support_merge="video", temperature=1.0)
    query = model.embed(Features(None, torch.tensor([[[0.1, 0.0]]])))
    support = query.map(lambda _: torch.tensor([[[0.1, 0.0], [0.0, 3.0]], [[0.1, 0.0], [0.2, 0.0]]]))
    # 0.01 / (0.01 + 0.01) for the equal vector, 0.02 / (0.02 + 0.01) for its double.
    close(model.match(support, query), [[1 / 4, 1 / 4 + 1 / 3]], absolute=1e-6)
    close(
        model.match(support, query, mask=torch.tensor([[True, False], [True, True]])),
        [[1 / 2, 1 / 4 + 1 / 3]],
        absolute=1e-6,
    )
