"""Training behind a frozen trunk: features computed once give the results of the trunk."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import SMALL, call, words

from fsar import EpisodeLoader, EpisodeRules, create_method
from fsar.cli.evaluate import cli as evaluate_cli
from fsar.cli.train import cli as train_cli
from fsar.cli.train import resolve
from fsar.evaluation.embeddings import clips_of
from fsar.evaluation.store import Found, Group, fill
from fsar.methods import FewShotMethod, method_options
from fsar.run import ranks
from fsar.training.frozen import IN_A_PART, CachedEpisodes, freeze_trunk
from fsar.training.trainer import Trainer
from pipelines.episodes.views import choose_views, draw_views
from shards_spec import ShardSet
from shards_spec.errors import ConfigError, FsarError
from shards_spec.files import DiskError

RULES = EpisodeRules(
    way=3, queries=2, frames=4, resize=72, crop=56, groups="any", random_frames=True, random_crop=True, query_flip=True
)
FROZEN = SMALL | {"freeze_trunk": True, "cached_views": 2, "query_flip": True, "num_classes": 3}
LEARNING = ["molo", "hyrsm", "hyrsm++", "trx", "ctx", "clip-fsar"]


def make_model(method: str, **options) -> FewShotMethod:
    torch.manual_seed(0)
    given = {"trunk": "tiny", "frames": 4, "num_classes": 3} | options
    known = method_options(method)
    model = create_method(method, **{key: value for key, value in given.items() if key in known})
    freeze_trunk(model, method)
    return model


def open_loader(shards: ShardSet, rules: EpisodeRules = RULES) -> EpisodeLoader:
    return EpisodeLoader(shards, "train", rules, seed=3, executor="portable", threads=1, prefetch=1)


def learn(model: FewShotMethod, episode) -> list[torch.Tensor]:
    """Loss terms and gradients; dropout is the same each time."""
    torch.manual_seed(1)
    output = model(episode)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(output.loss, learned, allow_unused=True)
    return [*output.losses.values(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("method", LEARNING)
def test_losses_and_gradients_are_those_behind_the_trunk(tiny_shards: ShardSet, tmp_path: Path, method: str) -> None:
    rules = replace(RULES, unlabelled_per_class=1) if method == "hyrsm++" else RULES
    model = make_model(method, semi_threshold=0.1)
    model.train()
    with open_loader(tiny_shards, rules) as loader:
        episodes = CachedEpisodes(loader, model, 3, cache=tmp_path)
        for plan, cached, _ in episodes.planned(0, 3):
            counts = [len(own) for own in (plan.support_rows, plan.query_rows, plan.unlabelled_rows)]
            chosen = np.concatenate(choose_views(plan.n, counts, 3, seed=3, flips=True))
            rows = np.concatenate([plan.support_rows, plan.query_rows, plan.unlabelled_rows])
            clips = clips_of(loader, draw_views(loader.stream, (rows << 16) + chosen))
            model.trunk.eval()
            direct = learn(model, loader.assemble(plan, clips))
            model.trunk.train()
            before = [buffer.clone() for buffer in model.trunk.buffers()]
            for ours, theirs in zip(learn(model, cached), direct, strict=True):
                close = 2e-2 if method == "molo" else 1e-5  # maps are float16
                torch.testing.assert_close(
                    ours, theirs, rtol=close, atol=close * float(theirs.detach().abs().max()) + 1e-7
                )
            assert all(torch.equal(*pair) for pair in zip(before, model.trunk.buffers(), strict=True))
    columns = {path.name for path in tmp_path.glob("*/part-*/*/")}
    assert columns == {"number"} | ({"maps", "images"} if method == "molo" else {"pooled"})


@pytest.mark.parametrize(("method", "options"), [("prototype", {"temperature": None}), ("otam", {})])
def test_methods_that_learn_nothing_after_the_trunk_refuse(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, options: dict
) -> None:
    with pytest.raises(ConfigError, match="nothing to train after its trunk"):
        make_model(method, **options)
    given = words(tiny_path, tmp_path / "run", freeze_trunk=True)
    assert call(train_cli, *given, "--method", method) == 2
    assert f"{method} has nothing to train after its trunk: leave --freeze-trunk out" in capsys.readouterr().err
    assert call(train_cli, *given, "--tasks", "augment") == 2
    assert 'tasks = "augment" needs a new view' in capsys.readouterr().err


def test_features_are_made_once_a_part_at_a_time(tiny_shards: ShardSet, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(IN_A_PART, "pooled", 8)
    model, made = make_model("hyrsm"), []
    trunk_forward = model.trunk.forward

    def counting(clips: torch.Tensor):
        if len(made) == 2:
            made.append(0)
            raise KeyboardInterrupt
        made.append(len(clips))
        return trunk_forward(clips)

    model.trunk.forward = counting
    with open_loader(tiny_shards) as loader:
        with pytest.raises(KeyboardInterrupt):
            CachedEpisodes(loader, model, 2, cache=tmp_path)
        first = CachedEpisodes(loader, model, 2, cache=tmp_path)
        assert made == [8, 8, 0, 8, 6]
        again = CachedEpisodes(loader, model, 2, cache=tmp_path)
        assert len(made) == 5
        places = np.array([29, 0, 17])
        assert torch.equal(first.store.read(places)["pooled"], again.store.read(places)["pooled"])
        other = CachedEpisodes(loader, model, 1, cache=tmp_path)  # of other views: other features
        assert sum(made[5:]) == 15
        assert torch.equal(other.store.read(places[1:2])["pooled"], first.store.read(places[1:2])["pooled"])
        (path,) = tmp_path.glob("*/part-000003/pooled/c/0/0/0")
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(FsarError, match=r"pooled/c/0/0/0 is damaged .*; delete .*part-000003"):
            CachedEpisodes(loader, model, 2, cache=tmp_path)
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
        with pytest.raises(DiskError, match="take fewer --cached-views"):
            CachedEpisodes(loader, model, 3, cache=tmp_path)


def test_processes_meet_after_every_batch_however_many_parts_each_makes(tmp_path: Path, monkeypatch) -> None:
    """The second one makes what the first one lacked: the first part was there when it looked."""
    numbers, made, met = np.arange(9), [], []

    def make(views: np.ndarray) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, len(views), 3):
            made.append(views[start : start + 3].tolist())
            yield {"pooled": torch.from_numpy(views[start : start + 3]).float()[:, None, None]}

    def make_or_find() -> Found:
        group = Group(tmp_path, {"trunk": "x"}, verify=False)
        return fill(group, numbers, make, size=4, batch=3, unit="view", hint="")

    def as_process(rank: int) -> None:
        made.clear()
        met.clear()
        monkeypatch.setattr(ranks, "rank", lambda: rank)
        with contextlib.suppress(FsarError):  # of parts that the other one makes
            make_or_find()

    with monkeypatch.context() as two:
        two.setattr(ranks, "count", lambda: 2)
        two.setattr(ranks, "of_first", lambda _: 0)  # the number of the next part
        two.setattr(ranks, "gather_values", lambda own: [own, numbers])
        two.setattr(ranks, "wait_for_all", lambda: met.append(len(made)))
        as_process(0)
        assert made == [[0, 1, 2], [3], [8]]
        assert met == [1, 2, 3, 3]  # after each batch, and at the end
        as_process(1)
        assert made == [[4, 5, 6], [7]]
        assert met == [1, 2, 2, 2]
    assert sorted(path.name for path in tmp_path.glob("*/part-*")) == [f"part-00000{number}" for number in range(3)]
    made.clear()
    assert make_or_find().read(numbers)["pooled"].flatten().tolist() == numbers.tolist()
    assert not made


def test_more_parts_are_mapped_than_files_may_be_open(tmp_path: Path) -> None:
    group, before = Group(tmp_path, {"trunk": "x"}), len(list(Path("/proc/self/fd").iterdir()))
    with group.adding() as first:
        for part in range(first, first + 20):
            group.write(part, np.array([part]), {"pooled": torch.full((1, 3), part)})
    found = group.find(np.arange(20))
    assert found.read(np.array([7, 3]))["pooled"][:, 0].tolist() == [7, 3]
    assert len(list(Path("/proc/self/fd").iterdir())) < before + 20


def test_only_labelled_videos_are_put_through_the_trunk(tiny_shards: ShardSet) -> None:
    with open_loader(tiny_shards, replace(RULES, labelled_fraction=0.6)) as loader:
        drawn = loader.stream.drawn_videos()
        plans = [loader.stream.plan(n) for n in range(40)]
    assert len(drawn) == 9
    assert set(drawn) == {row for plan in plans for row in (*plan.support_rows, *plan.query_rows)}


@pytest.fixture(scope="module")
def finished(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("frozen") / "run"
    flags = ["--freeze-trunk", "--cached-views", "2", "--query-flip", "--query-jitter", "true"]
    assert call(train_cli, *words(tiny_path, run), *flags) == 0
    return run


def test_a_frozen_run_is_a_run_like_others(finished: Path, tiny_path: Path, tmp_path: Path) -> None:
    result, out = json.loads((finished / "result.json").read_text()), tmp_path / "again.json"
    assert result["freeze_trunk"] is True
    assert "query_jitter = false" in (finished / "config.toml").read_text()
    assert call(evaluate_cli, "--weights", str(finished), "--shards", str(tiny_path), "--out", str(out)) == 0
    again = json.loads(out.read_text())
    assert (again["test"], again["overlap"]["status"]) == (result["test"], "none")
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert {"loss", "recons", "episodes_per_s", "data_wait"} <= set(log[0])


def test_killed_it_resumes_bit_for_bit_and_the_trunk_stays(
    finished: Path, tiny_shards: ShardSet, tmp_path: Path
) -> None:
    config = resolve("synthetic", "molo", "demo", None, FROZEN | {"feature_cache": str(tmp_path / "features")})
    config, device = replace(config, query_jitter=False), torch.device("cpu")
    with Trainer(config, tiny_shards, tmp_path, device=device) as trainer:
        start = {name: value.clone() for name, value in trainer.model.trunk.state_dict().items()}
        step = trainer.train_step

        def dies(n: int, episode) -> None:
            if n == 6:
                raise KeyboardInterrupt
            step(n, episode)

        trainer.train_step = dies
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    with Trainer(config, tiny_shards, tmp_path, device=device, resume=True) as trainer:
        assert trainer.progress.n == 4
        held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
        assert held
        assert held.isdisjoint(map(id, trainer.model.trunk.parameters()))
        trainer.train()
    ours, theirs = (load_file(run / "checkpoints" / "last.safetensors") for run in (tmp_path, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(torch.equal(ours[f"model.trunk.{name}"], value) for name, value in start.items())
