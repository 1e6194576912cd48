"""Momentum contrast: queue, momentum copy, exchange between processes, and the plain method."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed, multiprocessing, nn
from torch.nn import functional as F

from fsar.pretraining import MoCo, Views
from fsar.pretraining.moco import (
    contrast,
    enqueue,
    first_is_right,
    momentum_update,
    normalised_queue,
    shuffled,
    unshuffle,
)
from fsar.run.ranks import gather
from fsar.trunks.video import ThinResNet18
from shards_spec.errors import ConfigError


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 7), st.lists(st.integers(1, 10), min_size=1, max_size=5), st.booleans())
def test_a_queue_holds_the_last_keys(length, blocks, scalar) -> None:
    queue, pointer = torch.zeros(2, length), torch.zeros([] if scalar else [1], dtype=torch.int64)
    written = torch.arange(1, 1 + sum(blocks)).float()
    for block in written.split(blocks):
        enqueue(queue, pointer, torch.stack([block, -block], dim=1))
    wanted = torch.zeros(length)
    for number, value in enumerate(written):
        wanted[number % length] = value
    assert torch.equal(queue, torch.stack([wanted, -wanted]))
    assert int(pointer) == len(written) % length


def test_columns_of_a_new_queue() -> None:
    queue = normalised_queue(8, 5, torch.Generator().manual_seed(1))
    assert torch.allclose(queue.norm(dim=0), torch.ones(5))
    assert torch.equal(queue, normalised_queue(8, 5, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("momentum", [0.75, torch.tensor(0.75), torch.tensor([0.75], dtype=torch.float64)])
def test_momentum_moves_parameters_alone(momentum) -> None:
    query = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    key = copy.deepcopy(query)
    nn.init.ones_(query[0].weight)
    query[1].running_mean.fill_(5.0)
    before = key[0].weight.detach().clone()
    momentum_update(key, query, momentum)
    assert torch.allclose(key[0].weight, 0.75 * before + 0.25)
    assert torch.equal(key[1].running_mean, torch.zeros(4))
    with pytest.raises(ConfigError, match="a module and its copy"):
        momentum_update(key, query[0], momentum)


def test_the_positive_stands_first() -> None:
    query, key = (F.normalize(torch.randn(3, 4), dim=1) for _ in range(2))
    queue = normalised_queue(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        logits = contrast(query, key, queue, 0.5)
    assert logits.dtype == torch.float32
    wanted = [[q @ k, *(q @ column for column in queue.T)] for q, k in zip(query, key, strict=True)]
    assert torch.allclose(logits, 2 * torch.tensor(wanted), atol=1e-6)
    loss, right = first_is_right(torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 1.0]]))
    assert torch.isclose(loss, (torch.tensor([-2.0, 0.0, 1.0]).exp() + 1).log().mean())
    assert torch.isclose(right, torch.tensor(2 / 3))


def exchange(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(rank)  # the order must be that of rank 0 all the same
    inputs = torch.arange(4.0).reshape(4, 1).requires_grad_() + 4 * rank
    mixed, order = shuffled(inputs)
    torch.save((mixed, order, unshuffle(mixed * 10, order), gather(inputs)), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_processes_exchange_samples_and_get_their_own_keys_back(tmp_path) -> None:
    multiprocessing.spawn(exchange, (str(tmp_path),), nprocs=2)
    (mixed, order, keys, gathered), other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(order, other[1])
    assert torch.equal(torch.cat([mixed, other[0]]), order.float()[:, None])  # sample n has the value n
    assert not torch.equal(mixed, torch.arange(4.0)[:, None])
    assert torch.equal(torch.cat([keys, other[2]]), 10 * torch.arange(8.0)[:, None])
    assert torch.equal(gathered, torch.arange(8.0)[:, None])


def test_one_process_keeps_its_samples() -> None:
    inputs = torch.rand(3, 2)
    mixed, order = shuffled(inputs)
    assert mixed is inputs
    assert order is None
    assert unshuffle(mixed, order) is inputs


def method(**options) -> MoCo:
    torch.manual_seed(0)
    return MoCo(ThinResNet18(), dim=16, queue=8, **options)


def views(videos: int = 4) -> Views:
    generator = torch.Generator().manual_seed(1)
    return Views(*torch.rand(2, videos, 3, 4, 16, 16, generator=generator))


def test_a_step_of_moco() -> None:
    model, batch = method(momentum=0.5).train(), views()
    queue, key = model.queue.clone(), model.encoder_k.stem[0].weight.clone()
    with torch.no_grad():
        model.encoder_q.stem[0].weight.add_(1.0)
    output = model(batch)
    output.loss.backward()
    assert torch.allclose(model.encoder_k.stem[0].weight, key + 0.5)  # before the key pass, of parameters
    assert int(model.queue_ptr) == 4
    assert torch.equal(model.queue[:, 4:], queue[:, 4:])
    assert torch.allclose(model.queue[:, :4].norm(dim=0), torch.ones(4))
    assert not torch.allclose(model.queue[:, :4], queue[:, :4])
    assert model.encoder is model.encoder_q
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if name.split(".")[0] in ("encoder_q", "mlp_q")}


def test_evaluation_changes_nothing() -> None:
    model = method().eval()
    before = copy.deepcopy(model.state_dict())
    output = model(views())
    assert output.losses.keys() == output.accuracy.keys() == {"moco"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_trunk_of_frames_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose a video trunk such as r3d18"):
        MoCo("resnet18")
