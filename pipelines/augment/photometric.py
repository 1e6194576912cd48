"""Photometric augmentation of many clips at once on their device: grey, jitter, blur, normalise.

Every draw is a tensor with a value a clip, so nothing waits for the device. On a CPU
`pipelines.augment.frame_colours` does the same frame by frame. Source: FIMA's code (ZMHH-H/FIMA), whose
colour jitter is kornia's; its formulas changed between versions, and these are those of torchvision and of
kornia 0.6.4 and later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange

from pipelines.augment import clips as augment
from pipelines.augment.clips import Three
from pipelines.augment.frame_colours import Values, augment_clips, blur_clips
from pipelines.draw import Jitter
from shards_spec.errors import ConfigError

BlurSigma = Literal["fixed", "per_sample"]
_OPERATIONS = (augment.brightness, augment.contrast, augment.saturation, augment.hue)


@dataclass(frozen=True)
class PhotometricDraws:
    """What is random about one call, for N clips.

    Attributes:
        grey: Bool [N].
        factors: [4, N] of brightness, contrast, saturation and hue; 1, 1, 1 and 0 for clips without jitter.
        order: Places of the four operations, first applied first, for all clips.
        blur: Bool [N].
        sigma: [N] pixels.
    """

    grey: torch.Tensor
    factors: torch.Tensor
    order: tuple[int, ...]
    blur: torch.Tensor
    sigma: torch.Tensor

    def part(self, first: int, count: int) -> PhotometricDraws:
        """The draws of `count` of the clips."""
        some = slice(first, first + count)
        return PhotometricDraws(self.grey[some], self.factors[:, some], self.order, self.blur[some], self.sigma[some])

    def jitters(self) -> list[Jitter | None]:
        """What is done with the colours of each clip; None where nothing is."""
        found: list[Jitter | None] = []
        for (*factors, shift), grey in zip(self.factors.T.tolist(), self.grey.tolist(), strict=True):
            neutral = not grey and [*factors, shift] == [1, 1, 1, 0]
            found.append(None if neutral else Jitter(factors[0], factors[1], factors[2], shift, self.order, grey))
        return found


@dataclass(frozen=True)
class Photometric:
    """Rules of the augmentation; a call draws for each clip, the same for all of its frames.

    Attributes:
        mean: Constants of the normalisation that ends it.
        std: The same.
        grey: Probability of grey scale; that of `jitter` and `blur` likewise.
        jitter: Probability.
        blur: Probability; the kernel is about a tenth of the frame, clips under 20 pixels are not blurred.
        strength: Brightness, contrast and saturation factors are uniform in [1 - strength, 1 + strength].
        hue: The hue turns by a uniform share of a turn in [-hue, hue].
        sigma: Range of the blur's standard deviation in pixels.
        blur_sigma: "fixed", one value for the run, drawn from `seed`, as in the reference code; or "per_sample".
        seed: Of the fixed value.
    """

    mean: Three
    std: Three
    grey: float = 0.2
    jitter: float = 0.8
    blur: float = 0.5
    strength: float = 0.4
    hue: float = 0.1
    sigma: tuple[float, float] = (0.1, 2.0)
    blur_sigma: BlurSigma = "fixed"
    seed: int = 0

    def __post_init__(self) -> None:
        """ConfigError for values that mean nothing."""
        if self.blur_sigma not in ("fixed", "per_sample"):
            raise ConfigError(f'blur_sigma="{self.blur_sigma}" is not known; choose "fixed" or "per_sample"')
        if not 0 < self.sigma[0] <= self.sigma[1]:
            raise ConfigError(f"sigma={self.sigma} of the blur must be a range of positive numbers")
        for name in ("grey", "jitter", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be a probability, from 0 to 1")

    def draw(self, count: int, generator: torch.Generator) -> PhotometricDraws:
        """Draw for `count` clips, on the generator's device; with one of the CPU nothing waits for a GPU."""
        device = generator.device
        chance = torch.rand(3, count, generator=generator, device=device)
        spread = torch.rand(5, count, generator=generator, device=device)
        order = torch.randperm(4, generator=generator, device=device)
        half = torch.tensor([self.strength] * 3 + [self.hue], device=device)[:, None]
        neutral = torch.tensor([1.0, 1.0, 1.0, 0.0], device=device)[:, None]
        factors = neutral + half * (2 * spread[:4] - 1) * (chance[1] < self.jitter)
        low, high = self.sigma
        shares = self._fixed_share() if self.blur_sigma == "fixed" else spread[4]
        sigma = low + (high - low) * shares * torch.ones(count, device=device)
        return PhotometricDraws(chance[0] < self.grey, factors, tuple(order.tolist()), chance[2] < self.blur, sigma)

    def _fixed_share(self) -> float:
        return torch.rand((), generator=torch.Generator().manual_seed(self.seed)).item()

    def __call__(self, clips: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Clips [N, T, 3, H, W] in [0, 1] -> the same shape, augmented and normalised."""
        return self.apply(clips, self.draw(len(clips), generator))

    def apply(self, clips: torch.Tensor, draws: PhotometricDraws) -> torch.Tensor:
        """Clips [N, T, 3, H, W] in [0, 1] -> the same shape, augmented as drawn and normalised."""
        if _on_cpu(clips):
            kernels = _chosen_kernels(clips, draws.sigma, draws.blur)
            return augment_clips(clips, draws.jitters(), kernels, augment.colour_matrix(self.mean, self.std))
        grey = draws.grey.to(clips.device, non_blocking=True)
        factors = draws.factors.to(clips, non_blocking=True)[..., None, None, None, None]  # [4, N, 1, 1, 1, 1]
        clips = torch.where(_each(grey), augment.greyscale(clips), clips)
        for place in draws.order:
            clips = _OPERATIONS[place](clips, factors[place])
        if self.blur:
            clips = gaussian_blur(clips, draws.sigma, where=draws.blur)
        return augment.normalise(clips, self.mean, self.std)


def _each(values: torch.Tensor) -> torch.Tensor:
    """[N] -> [N, 1, 1, 1, 1]."""
    return values[:, None, None, None, None]


def _on_cpu(clips: torch.Tensor) -> bool:
    return clips.device.type == "cpu" and clips.dtype == torch.float32


def gaussian_blur(clips: torch.Tensor, sigma: torch.Tensor, *, where: torch.Tensor | None = None) -> torch.Tensor:
    """Blur clips [N, T, 3, H, W], each with its own `sigma` [N]; the border is mirrored.

    The kernel has 2 floor(floor(0.1 S) / 2) + 1 taps of the shorter side S: 23 for 224, 11 for 112.  `where`, bool [N]
    like `sigma` on the host, says which clips are blurred; None: all.
    """
    if _on_cpu(clips):
        where = torch.ones(len(clips), dtype=torch.bool) if where is None else where
        return blur_clips(clips, _chosen_kernels(clips, sigma, where))
    kernels = _kernels(clips, sigma.to(clips.device, non_blocking=True))  # [N, taps]
    reach = kernels.shape[1] // 2
    frames = rearrange(clips, "n t c h w -> (t c) n h w")
    frames = F.pad(frames, [reach] * 4, mode="reflect")
    frames = F.conv2d(frames, kernels[:, None, :, None], groups=len(kernels))
    frames = F.conv2d(frames, kernels[:, None, None, :], groups=len(kernels))
    blurred = rearrange(frames, "(t c) n h w -> n t c h w", c=clips.shape[2])
    return blurred if where is None else torch.where(_each(where.to(clips.device, non_blocking=True)), blurred, clips)


def _kernels(clips: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """[N, taps] of the blur of clips; one tap of 1 where they are small."""
    taps = 2 * (min(clips.shape[-2:]) // 10 // 2) + 1
    apart = torch.arange(taps, device=sigma.device) - taps // 2
    return torch.softmax(-(apart**2) / (2 * sigma[:, None] ** 2), dim=1).to(clips.dtype)


def _chosen_kernels(clips: torch.Tensor, sigma: torch.Tensor, where: torch.Tensor) -> list[Values | None]:
    """The same on the host; None for clips that stay sharp."""
    kernels = _kernels(clips, sigma)
    blurs = where & (kernels.shape[1] > 1)
    return [kernel if blurred else None for kernel, blurred in zip(kernels.numpy(), blurs.tolist(), strict=True)]
