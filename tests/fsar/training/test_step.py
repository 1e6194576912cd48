"""The training step waits for nothing and keeps no NaN; graph and recomputation change nothing."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fsar.episode import Episode
from fsar.methods import METHODS, create_method, method_options
from fsar.run.build import build_model, memory_format
from fsar.run.config import build_config
from fsar.training import graphs
from fsar.training.optim import create_optimizer
from fsar.training.step import TrainingStep
from fsar.trunks import ALL_PARTS, create_trunk
from fsar.trunks.clip import ClipViT
from shards_spec.errors import ConfigError

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SMALL = {"heads": 4, "num_classes": 6, "width": 24, "frames": 4}


def make_model(name: str = "molo", **options):
    torch.manual_seed(0)
    known = method_options(name)
    options = {key: value for key, value in SMALL.items() if key in known} | {"trunk": create_trunk("tiny")} | options
    return create_method(name, **options).train()


def make_episode(seed: int = 0, *, device: str = "cpu", size: int = 32, **fields) -> Episode:
    generator = torch.Generator().manual_seed(seed)
    values = {
        "support": torch.randn(3, 1, 4, 3, size, size, generator=generator),
        "query": torch.randn(6, 4, 3, size, size, generator=generator),
        "query_labels": torch.arange(6) % 3,
        "class_ids": torch.arange(3),
        "base_ids": torch.arange(3),
    }
    return Episode(**(values | fields)).to(device)


def poisoned(episode: Episode) -> Episode:
    return replace(episode, query=torch.full_like(episode.query, torch.nan))


def tensors(step: TrainingStep) -> list[torch.Tensor]:
    """Gradients and buffers after some episodes."""
    return [tensor.clone() for tensor in (*step.gradients(), *step.model.buffers())]


class NothingWaits(TorchDispatchMode):
    """Refuses what would read the device, and constants that would be copied to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        assert name not in ("nonzero", "masked_select", "_unique2", "lift_fresh", "equal"), name
        of_class = name == "_local_scalar_dense" and args[0].dtype == torch.int64
        assert of_class or name != "_local_scalar_dense"  # numbers of base classes are read, only on a CPU
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "motion"])
def test_the_step_of_every_method_waits_for_nothing(name):
    step = TrainingStep(make_model(name), precision="bf16")
    episode = make_episode()
    step.run(episode)
    with NothingWaits():
        step.run(episode)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "motion"])
def test_matching_losses_and_gradients_are_float32_in_bfloat16(name):
    model, episode = make_model(name), make_episode()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(episode)
        embedding = model.eval().embed(model.trunk(episode.query))
        support = embedding.map(lambda x: x[:3, None].float())
        query = embedding.map(lambda x: x.float())
        reads = {"class_text": torch.zeros(3, model.channels)} if "class_text" in model.reads else {}
        logits = model.match(support, query, **reads)
    assert {output.logits.dtype, logits.dtype, *(term.dtype for term in output.losses.values())} == {torch.float32}
    step = TrainingStep(make_model(name), precision="bf16")
    step(episode, seed=1)
    assert {gradient.dtype for gradient in step.gradients()} == {torch.float32}


def test_gradients_of_a_group_are_those_of_plain_backward_and_nan_leaves_no_trace():
    step, plain = (TrainingStep(make_model(), per_update=2) for _ in range(2))
    for number, episode in enumerate((make_episode(1), poisoned(make_episode(2)), make_episode(3))):
        step(episode, seed=number)
        if number != 1:
            torch.manual_seed(number)
            (plain.model(episode).loss / 2).backward()
    assert all(torch.equal(a, b) for a, b in zip(tensors(step), tensors(plain), strict=True))
    reading = step.read()
    assert (reading.counted, reading.skipped, reading.longest) == (2, 1, 1)
    assert set(reading.totals) >= {"ce", "recons", "loss", "accuracy"}
    assert step.read().counted == 0


def test_longest_row_is_seen_though_it_has_ended():
    step = TrainingStep(make_model())
    good, bad = make_episode(), poisoned(make_episode())
    for episode in (bad, bad, bad, good, bad):
        step(episode, seed=0)
    assert step.read().longest == 3
    step(bad, seed=0)
    assert step.read().longest == 2  # a row goes on across readings


def test_updates_are_left_out_without_a_finite_gradient():
    step = TrainingStep(make_model())
    optimizer = create_optimizer(step.model, lr=1.0)

    def update(episode: Episode | None, *, spoil: bool = False) -> bool:
        """Tell whether an update changed anything."""
        before = copy.deepcopy([*step.model.parameters(), *optimizer.state_dict()["state"].values()])
        if episode is not None:
            step(episode, seed=0)
        if spoil:
            step.gradients()[0].fill_(torch.inf)
        step.update(optimizer, 1e-3)
        assert not any(gradient.any() for gradient in step.gradients())
        after = [*step.model.parameters(), *optimizer.state_dict()["state"].values()]
        return len(before) != len(after) or not all(
            a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
            if isinstance(a, dict)
            else torch.equal(a, b)
            for a, b in zip(before, after, strict=True)
        )

    assert update(make_episode())
    assert not update(poisoned(make_episode()))
    assert not update(make_episode(), spoil=True)
    assert not update(None)
    assert update(make_episode())
    assert step.read().skipped_steps == 3


def test_an_update_is_the_step_of_adam_at_that_rate():
    step = TrainingStep(make_model())
    other = copy.deepcopy(step.model)
    optimizer, adam = create_optimizer(step.model, lr=1.0), torch.optim.Adam(other.parameters(), weight_decay=1e-3)
    for number, rate in enumerate((1e-3, 1e-4)):
        step(make_episode(number), seed=number)
        for parameter, twin in zip(step.model.parameters(), other.parameters(), strict=True):
            twin.grad = None if parameter.grad is None else parameter.grad.clone()
        for group in optimizer.param_groups:
            group["weight_decay"] = 1e-3
        step.update(optimizer, rate)
        adam.param_groups[0]["lr"] = rate
        adam.step()
    for ours, theirs in zip(step.model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet-lite0", "clip-rn50", "clip-vit", "tiny"])
def test_recomputed_activations_change_nothing(name):
    torch.manual_seed(0)
    small = {"width": 32, "depth": 2, "heads": 4, "channels": 16, "size": 32}
    trunk = (ClipViT(**small) if name == "clip-vit" else create_trunk(name)).train()
    frames, results, kept = torch.randn(2, 1, 3, *2 * (getattr(trunk, "size", 64),)), [], []
    start = copy.deepcopy(trunk.state_dict())
    for trunk.recomputes in (0, 1, ALL_PARTS):
        trunk.load_state_dict(start)
        sizes: dict[int, int] = {}

        def keep(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            pooled = trunk(frames).pooled
        kept.append(sum(sizes.values()))
        gradients = torch.autograd.grad(pooled.square().sum(), list(trunk.parameters()), allow_unused=True)
        results.append([gradient for gradient in gradients if gradient is not None])
        results.append([buffer.clone() for buffer in trunk.buffers()])
    plain, statistics = results[:2]
    for recomputed, after in (results[2:4], results[4:]):
        assert all(torch.equal(a, b) for a, b in zip(statistics, after, strict=True))
        assert len(plain) == len(recomputed)
        for ours, theirs in zip(recomputed, plain, strict=True):
            torch.testing.assert_close(ours, theirs)
    whole, first, every = kept
    assert every < whole
    assert every < first < whole or name == "tiny"  # which is one part
    assert all(norm.momentum == 0.1 for norm in trunk.modules() if hasattr(norm, "momentum"))


@pytest.mark.parametrize(
    ("options", "parts"),
    [({}, 0), ({"checkpoint_activations": True}, ALL_PARTS), ({"checkpoint_parts": 2}, 2),
     ({"checkpoint_activations": True, "checkpoint_parts": 2}, 2)],
)  # fmt: skip
def test_a_run_recomputes_what_it_is_told(options, parts):
    config = build_config({"method": "otam", "trunk": "resnet18", "trunk_weights": "random", **options})
    assert build_model(config).trunk.recomputes == parts


def test_order_in_memory_follows_device_and_precision(monkeypatch):
    from fsar.cli.train import resolve  # noqa: PLC0415 -- a command, needed only here

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    given = {"num_classes": 3, "trunk": "resnet18", "trunk_weights": "random", "frames": 4}
    for options, wanted in (
        ({}, torch.contiguous_format),
        ({"device": "cpu"}, torch.channels_last),
        ({"device": "cpu", "memory_format": "contiguous"}, torch.contiguous_format),
        ({"precision": "bf16"}, torch.channels_last),
        ({"precision": "bf16", "memory_format": "contiguous"}, torch.contiguous_format),
        ({"memory_format": "channels-last"}, torch.channels_last),
    ):
        model = build_model(resolve("synthetic", "molo", "demo", None, given | options))
        assert model.trunk.memory_format == model.decoder.memory_format == wanted
    config = resolve("synthetic", "molo", "demo", None, {})
    assert memory_format(config, create_trunk("tiny").memory_format) == torch.channels_last  # its own
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert memory_format(config, torch.contiguous_format) == torch.channels_last  # "auto" is the CPU


class StandIn:
    """In place of a CUDA graph: runs the step again on the buffers that it was captured with."""

    def __init__(self, run, episode):
        self.run, self.episode = run, episode

    def replay(self):
        self.run(self.episode)


def test_episodes_of_one_shape_share_a_graph_and_others_do_without(monkeypatch, capsys):
    monkeypatch.setattr(graphs.Graphed, "_capture", lambda self, episode: StandIn(self._run, episode))
    step, plain = TrainingStep(make_model()), TrainingStep(make_model())
    step._run = graphed = graphs.Graphed(step.run, step.state, step.device)
    mask = torch.ones(3, 1, dtype=torch.bool)
    episodes = [make_episode(1), make_episode(2), make_episode(3), make_episode(4, size=16)]
    episodes += [make_episode(5), make_episode(6, support_mask=mask)]
    kept = []
    for number, episode in enumerate(episodes):
        for each in (step, plain):
            each(episode, seed=number)
        kept.append(graphed._graph)
    assert [graph is not None for graph in kept] == [False, *5 * [True]]
    assert len({id(graph) for graph in kept[1:]}) == 1
    assert all(torch.equal(a, b) for a, b in zip(tensors(step), tensors(plain), strict=True))
    assert capsys.readouterr().out.count("without the graph") == 1


@gpu
@needs_gpu
@pytest.mark.parametrize("name", [name for name in METHODS if name != "motion"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_replayed_graph_gives_what_the_step_gives(name, precision):
    """Five episodes, one of them NaN; the fourth tells the random states apart."""
    results = []
    for graph in (False, True):
        step = TrainingStep(make_model(name).to("cuda"), precision=precision, graph=graph)
        for number in range(5):
            episode = make_episode(number, device="cuda")
            step(poisoned(episode) if number == 2 else episode, seed=number)
        results.append((step.read(), tensors(step)))
    (eager, plain), (graphed, replayed) = results
    assert (graphed.counted, graphed.skipped, graphed.longest) == (4, 1, 1)
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    assert graphed.totals == pytest.approx(eager.totals, rel=tolerance, abs=tolerance)
    for ours, theirs in zip(replayed, plain, strict=True):
        assert (ours - theirs).double().norm() <= tolerance * (theirs.double().norm() + 1)


@gpu
@needs_gpu
def test_capture_leaves_everything_as_it_was():
    step = TrainingStep(make_model().to("cuda"), graph=True)
    step(make_episode(device="cuda"), seed=0)
    before, weights = tensors(step), [parameter.clone() for parameter in step.model.parameters()]
    random = torch.cuda.get_rng_state()
    step._run._capture(graphs.copy_of(make_episode(1, device="cuda")))
    assert all(torch.equal(a, b) for a, b in zip(tensors(step), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(step.model.parameters(), weights, strict=True))
    assert torch.equal(torch.cuda.get_rng_state(), random)


@gpu
@needs_gpu
@pytest.mark.parametrize("graph", [False, True])
def test_no_step_waits_for_the_device(graph):
    step = TrainingStep(make_model().to("cuda"), precision="bf16", graph=graph)
    optimizer = create_optimizer(step.model, lr=1e-3)
    episodes = [make_episode(number, device="cuda") for number in range(4)]
    for number, episode in enumerate(episodes):
        if number == 2:  # warmed up and captured
            torch.cuda.set_sync_debug_mode("error")
        try:
            step(episode, seed=number)
            step.update(optimizer, 1e-3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert step.read().counted == 4


@gpu
@needs_gpu
def test_a_model_that_waits_is_refused_by_the_graph():
    model = make_model("prototype").to("cuda")
    forward = model.forward
    model.forward = lambda episode: (episode.query.sum().item(), forward(episode))[1]
    step = TrainingStep(model, graph=True)
    step(make_episode(device="cuda"), seed=0)
    with pytest.raises(ConfigError, match="--graph false"):
        step(make_episode(device="cuda"), seed=0)
