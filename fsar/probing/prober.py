"""Probe a trunk's features on labelled videos: by retrieval, neighbours, a classifier."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from math import comb
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fsar.probing.classifier import Classifier, Fit, Training
from fsar.probing.features import PART, video_features
from fsar.probing.loader import ProbeLoader
from fsar.probing.neighbours import AT, Retrieval, retrieve, vote
from fsar.probing.scores import Asked, average_clips
from fsar.probing.weights import Probed
from fsar.run.device import autocast
from pipelines.clips.labelled import ProbeRules, random_clips
from pipelines.clips.stream import ClipStream
from shards_spec import ShardSet
from shards_spec.errors import ConfigError, choice
from shards_spec.splits.divisions import Division

VIEWS = ("fresh", "cached")


@dataclass(frozen=True)
class Rules:
    """Rules of a probe: how clips are cut, and how they are computed.

    Attributes:
        clips: How test clips are cut.
        training: How those are that a classifier is trained on; None: the same.
        clip_average: How a classifier's answers for a video's clips become one: logit, logprob or
            prob.
        precision: fp32 or bf16 (autocast).
        executor: dali, portable or auto.
        threads: Decoding threads; 0: one a core.
        prefetch: Videos or batches prepared ahead.
        seed: Of batches, crops, dropout and the classifier's first weights.
        test_every: Epochs between tests while a classifier is trained; 0: only at the end.
    """

    clips: ProbeRules
    training: ProbeRules | None = None
    clip_average: str = "logit"
    precision: str = "fp32"
    executor: str = "auto"
    threads: int = 0
    prefetch: int = 2
    seed: int = 0
    test_every: int = 0


class Prober:
    """One trunk on the videos of one division; a context manager.

    Args:
        shards: The opened shard set.
        division: Its training and test videos.
        probed: The trunk; it is moved to the device.
        rules: How videos are looked at.
        device: Where the trunk computes.
        cache: Folder in which features are kept; None: nowhere.
    """

    def __init__(
        self,
        shards: ShardSet,
        division: Division,
        probed: Probed,
        rules: Rules,
        *,
        device: torch.device,
        cache: Path | None = None,
    ) -> None:
        self.shards, self.division, self.probed, self.rules = shards, division, probed, rules
        self.device, self.cache = device, cache
        probed.trunk.to(device)
        self.loader = ProbeLoader(
            shards,
            rules.clips,
            probed.trunk,
            device=device,
            executor=rules.executor,
            threads=rules.threads,
            prefetch=rules.prefetch,
        )
        self.numbers = class_numbers(shards, division)
        self.asked = ask(shards, division, rules.clips)

    def retrieval(self) -> tuple[dict[str, Any], Retrieval]:
        """Compute recall at the k of `AT` that the gallery allows; also return the videos found."""
        truth = self._places(self.division.train)
        at = [k for k in AT if k <= len(truth)]
        found = retrieve(
            self.gallery,
            self.queries,
            gallery_labels=torch.from_numpy(truth),
            query_labels=torch.from_numpy(self.asked.truth),
            at=at,
        )
        right = torch.from_numpy(truth)[found.found].numpy() == self.asked.truth[:, None]  # [Q, k]
        recall = {f"R@{k}": self.asked.share(right[:, :k].any(axis=1)) for k in at}
        chance = {f"R@{k}": chance_recall(truth, self.asked.truth, k) for k in at}
        return {"recall": recall, "chance": chance, "gallery": len(truth), "queries": len(right)}, found

    def knn(self, *, k: int, temperature: float) -> dict[str, Any]:
        """Compute the accuracy of the votes of nearest neighbours."""
        labels = torch.from_numpy(self._places(self.division.train))
        count = len(self.asked.classes)
        votes = vote(self.gallery, self.queries, labels, classes=count, k=k, temperature=temperature)
        how = {"k": k, "temperature": temperature, "vote": "weighted by exp(cosine / temperature)"}
        return (how if temperature else how | {"vote": "majority"}) | self.asked.summarise(votes)

    def classify(
        self, fit: Fit, *, frozen: bool, views: str = "fresh", run: Path | None = None, resume: bool = False
    ) -> dict[str, Any]:
        """Train a classifier on the training videos and test it on the others.

        Args:
            fit: How it is trained.
            frozen: Train only the classifier (linear probe), not the trunk with it (fine-tuning).
            views: Of a frozen trunk: "fresh" clips, cropped and coloured anew, as published; or
                "cached", one of each video's test clips, which costs next to nothing an epoch.
            run: Folder of the log and the checkpoint.
            resume: Go on from the checkpoint in it.

        Raises:
            ConfigError: classes to test that no training video has.
        """
        choice("views", views, VIEWS)
        self._check_classes()
        training = self._training(fit, frozen=frozen, views=views if frozen else "fresh", run=run)
        curve: dict[int, float] = {}

        def after(epoch: int) -> dict[str, float]:
            every = self.rules.test_every
            if not every or epoch % every:
                return {}
            curve[epoch] = self._test(training.model)["accuracy"]["value"]
            return {"test_accuracy": curve[epoch]}

        training.train(resume=resume, after=after)
        result = {"fit": asdict(fit), "clip_average": self.rules.clip_average} | self._test(training.model)
        if frozen:
            result["views"] = views
        if curve:  # published figures may be the best of these: chosen on the test videos
            best = max(curve, key=lambda epoch: curve[epoch])
            result["chosen_on_test"] = {"epoch": best, "accuracy": curve[best]}
        return result

    def _training(self, fit: Fit, *, frozen: bool, views: str, run: Path | None) -> Training:
        rules, rows = self.rules, self.division.train.tolist()
        model = Classifier(
            self.probed.trunk,
            len(self.asked.classes),
            dropout=fit.dropout,
            l2norm=fit.l2norm,
            frozen=frozen,
            seed=rules.seed,
        ).to(self.device)
        cut = self._cut
        stream = random_clips(self.shards, rows, cut, batch=fit.batch, seed=rules.seed)
        facts = asdict(fit) | asdict(cut) | {f"test_{key}": value for key, value in asdict(rules.clips).items()}
        facts |= {"weights": self.probed.sha256, "views": views}
        facts |= {"division": self.division.sha256(self.shards), "precision": rules.precision, "seed": rules.seed}
        return Training(
            model,
            fit,
            source=partial(self._cached if views == "cached" else self._fresh, stream),
            steps=stream.epoch_steps,
            forward=model.head if views == "cached" else model,
            seed=rules.seed,
            precision=rules.precision,
            run=run,
            facts={key: list(value) if isinstance(value, tuple) else value for key, value in facts.items()},
        )

    @property
    def _cut(self) -> ProbeRules:
        """Rules of training clips."""
        return self.rules.training or self.rules.clips

    @torch.no_grad()
    def _test(self, model: Classifier) -> dict[str, Any]:
        """Compute the accuracy of a classifier on the test videos."""
        model.eval()
        if model.frozen:
            logits = [model.head(part.to(self.device)) for part in torch.split(self._test_clips, PART)]
            scores = torch.cat([average_clips(each, self.rules.clip_average) for each in logits])
        else:
            scores = torch.stack(
                [
                    average_clips(self._logits(model, clips), self.rules.clip_average)
                    for clips in self.loader.uniform(self.division.test.tolist())
                ]
            )
        return self.asked.summarise(scores)

    def _logits(self, model: Classifier, clips: Tensor) -> Tensor:
        with autocast(self.device, self.rules.precision):
            logits: Tensor = model(clips)
        return logits.float()

    @cached_property
    def gallery(self) -> Tensor:
        """[N, C] mean features of the training videos."""
        return torch.cat([part.mean(dim=1) for part in self._parts(self.division.train)])

    @cached_property
    def queries(self) -> Tensor:
        """[Q, C] mean features of the test videos."""
        return self._test_clips.mean(dim=1)

    @cached_property
    def _test_clips(self) -> Tensor:
        """[Q, clips, C] features of the test videos' clips."""
        return torch.cat(list(self._parts(self.division.test)))

    @cached_property
    def _training_clips(self) -> Tensor:
        """[N, clips, C] features of the training videos' test clips."""
        return torch.cat(list(self._parts(self.division.train)))

    def _parts(self, rows: NDArray[np.int64]) -> Iterator[Tensor]:
        return video_features(self.probed, self.loader, rows.tolist(), precision=self.rules.precision, cache=self.cache)

    def _fresh(self, stream: ClipStream, start: int, stop: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield batches of new clips of the training videos."""
        for clips, rows in self.loader.random(stream, start, stop, jitter=self._cut.jitter):
            yield clips, torch.from_numpy(self._places(rows)).to(self.device)

    def _cached(self, stream: ClipStream, start: int, stop: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield batches of stored features: of each video one of its test clips."""
        for n in range(start, stop):
            rows = stream.batch_rows(n)
            chosen = np.random.default_rng((self.rules.seed, n)).integers(self.rules.clips.clips, size=len(rows))
            features = self._training_clips[np.searchsorted(self.division.train, rows), chosen]
            yield features.to(self.device), torch.from_numpy(self._places(rows)).to(self.device)

    def _places(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Find the places [n] of the classes of videos among the division's own."""
        return np.searchsorted(self.numbers, self.shards.labels[rows]).astype(np.int64)

    def _check_classes(self) -> None:
        lacking = np.setdiff1d(self.asked.truth, self._places(self.division.train)).tolist()
        if lacking:
            raise ConfigError(
                f"{len(lacking)} classes are tested of which no video trains (such as "
                f'"{self.asked.classes[lacking[0]]}"): a classifier cannot name them; choose other --lists'
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.loader.close()


def class_numbers(shards: ShardSet, division: Division) -> NDArray[np.int64]:
    """List the numbers [K] in the data set of the classes of a division's videos, ascending."""
    return np.unique(shards.labels[np.concatenate([division.train, division.test])]).astype(np.int64)


def ask(shards: ShardSet, division: Division, clips: ProbeRules) -> Asked:
    """Collect truth and groups of the test videos of a division."""
    numbers = class_numbers(shards, division)
    return Asked(
        truth=np.searchsorted(numbers, shards.labels[division.test]).astype(np.int64),
        groups=shards.groups[division.test].astype(np.int64),
        short=shards.frames[division.test] < clips.window,
        classes=[shards.dataset.classes[number] for number in numbers.tolist()],
    )


def chance_recall(gallery: NDArray[np.int64], queries: NDArray[np.int64], k: int) -> float:
    """Compute recall at k by chance: k videos of the gallery are drawn for each query."""
    count, own = np.unique(gallery, return_counts=True)
    of_class = dict(zip(count.tolist(), own.tolist(), strict=True))
    everything = comb(len(gallery), k)
    misses = {c: comb(len(gallery) - of_class.get(c, 0), k) / everything for c in np.unique(queries).tolist()}
    return 1 - float(np.mean([misses[c] for c in queries.tolist()]))
