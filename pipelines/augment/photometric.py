"""Augment the colours of many clips at once on their device, as FIMA, MoCo and MSCL do.

Every draw is a tensor with a value a clip, so nothing waits for the device. On a CPU
`pipelines.augment.on_cpu` does the same frame by frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange

from pipelines.augment.clips import OPERATIONS, brightness, greyscale, hue, normalise
from pipelines.augment.on_cpu import Three, Values, augment_clips, blur_clips, colour_matrix
from pipelines.draw import Jitter
from shards_spec.errors import ConfigError, choice

BlurSigma = Literal["fixed", "per_sample"]
Sync = Literal["clip", "frame"]


@dataclass(frozen=True)
class PhotometricDraws:
    """All that is random about one call of `Photometric`, for N clips.

    Attributes:
        grey: Bool [N].
        factors: [4, N] of brightness, contrast, saturation and hue; 1, 1, 1 and 0 for clips without
            jitter.
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
        """Return the draws of `count` of the clips."""
        some = slice(first, first + count)
        return PhotometricDraws(self.grey[some], self.factors[:, some], self.order, self.blur[some], self.sigma[some])

    def jitters(self) -> list[Jitter | None]:
        """Return the jitter of each clip; None where its colours stay."""
        found: list[Jitter | None] = []
        for (*factors, shift), grey in zip(self.factors.T.tolist(), self.grey.tolist(), strict=True):
            neutral = not grey and [*factors, shift] == [1, 1, 1, 0]
            found.append(None if neutral else Jitter(factors[0], factors[1], factors[2], shift, self.order, grey))
        return found


@dataclass(frozen=True)
class Photometric:
    """Rules of FIMA's augmentation: grey, jitter, blur, normalise.

    Frames of a clip share their draws.

    Source: FIMA's code (ZMHH-H/FIMA), whose colour jitter is kornia's. Its formulas changed between
    versions; these are those of torchvision and of kornia 0.6.4 and later.

    Attributes:
        mean: Mean of each colour, for the normalisation that ends it.
        std: Standard deviation of each colour.
        grey: Probability of grey scale.
        jitter: Probability of jitter.
        blur: Probability of blur. The kernel is about a tenth of the frame; clips under 20 pixels
            stay sharp.
        strength: Brightness, contrast and saturation factors are uniform in
            [1 - strength, 1 + strength].
        hue: The hue turns by a uniform share of a turn in [-hue, hue].
        sigma: Range of the blur's standard deviation in pixels.
        blur_sigma: "fixed", one value for the run, drawn from `seed`, as in the reference code; or
            "per_sample".
        seed: Seed of the fixed value.
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
        """Draw for `count` clips, on the generator's device.

        Draws of the CPU wait for no GPU.
        """
        device = generator.device
        chance = torch.rand(3, count, generator=generator, device=device)
        spread = torch.rand(5, count, generator=generator, device=device)
        order = torch.randperm(4, generator=generator, device=device)
        factors = _factors(spread[:4], chance[1] < self.jitter, strength=self.strength, hue=self.hue)
        low, high = self.sigma
        shares = self._fixed_share() if self.blur_sigma == "fixed" else spread[4]
        sigma = low + (high - low) * shares * torch.ones(count, device=device)
        return PhotometricDraws(chance[0] < self.grey, factors, tuple(order.tolist()), chance[2] < self.blur, sigma)

    def _fixed_share(self) -> float:
        return torch.rand((), generator=torch.Generator().manual_seed(self.seed)).item()

    def __call__(self, clips: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw, then augment and normalise clips [N, T, 3, H, W] in [0, 1]."""
        return self.apply(clips, self.draw(len(clips), generator))

    def apply(self, clips: torch.Tensor, draws: PhotometricDraws) -> torch.Tensor:
        """Augment clips [N, T, 3, H, W] in [0, 1] as drawn, and normalise them."""
        if _on_cpu(clips):
            kernels = _chosen_kernels(clips, draws.sigma, draws.blur)
            return augment_clips(clips, draws.jitters(), kernels, colour_matrix(self.mean, self.std))
        grey = draws.grey.to(clips.device, non_blocking=True)
        factors = draws.factors.to(clips, non_blocking=True)[..., None, None, None, None]  # [4, N, 1, 1, 1, 1]
        clips = torch.where(_each(grey), greyscale(clips), clips)
        for place in draws.order:
            clips = OPERATIONS[place](clips, factors[place])
        if self.blur:
            clips = gaussian_blur(clips, draws.sigma, where=draws.blur)
        return normalise(clips, self.mean, self.std)


def _factors(spread: torch.Tensor, jittered: torch.Tensor, *, strength: float, hue: float) -> torch.Tensor:
    """Turn numbers [4, N, ...] in [0, 1) into the factors of four operations.

    Clips that are not jittered, bool [N, ...], get 1, 1, 1 and 0, which change nothing: so all of
    them take the same operations, and nothing has to ask the device which.
    """
    rest = (1,) * (spread.ndim - 1)
    half = torch.tensor([strength] * 3 + [hue], device=spread.device).reshape(4, *rest)
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0], device=spread.device).reshape(4, *rest)
    return neutral + half * (2 * spread - 1) * jittered


def _each(values: torch.Tensor) -> torch.Tensor:
    """Turn [N] into [N, 1, 1, 1, 1]."""
    return values[:, None, None, None, None]


def _on_cpu(clips: torch.Tensor) -> bool:
    return clips.device.type == "cpu" and clips.dtype == torch.float32


def gaussian_blur(clips: torch.Tensor, sigma: torch.Tensor, *, where: torch.Tensor | None = None) -> torch.Tensor:
    """Blur clips [N, T, 3, H, W], each with its own `sigma` [N]; the border is mirrored.

    The kernel has 2 floor(floor(0.1 S) / 2) + 1 taps of the shorter side S: 23 for 224, 11 for 112.

    Args:
        clips: Values of any range.
        sigma: Standard deviations in pixels, on the host.
        where: Bool [N] on the host, the clips that are blurred; None: all.
    """
    if _on_cpu(clips):
        where = torch.ones(len(clips), dtype=torch.bool) if where is None else where
        return blur_clips(clips, _chosen_kernels(clips, sigma, where))
    kernels = _kernels(clips, sigma.to(clips.device, non_blocking=True))  # [N, taps]
    reach = kernels.shape[1] // 2
    frames = rearrange(clips, "n t c h w -> (t c) n h w")  # a group of channels for each clip, which has its own taps
    frames = F.pad(frames, [reach] * 4, mode="reflect")
    frames = F.conv2d(frames, kernels[:, None, :, None], groups=len(kernels))
    frames = F.conv2d(frames, kernels[:, None, None, :], groups=len(kernels))
    blurred = rearrange(frames, "(t c) n h w -> n t c h w", c=clips.shape[2])
    return blurred if where is None else torch.where(_each(where.to(clips.device, non_blocking=True)), blurred, clips)


def _kernels(clips: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Return kernels [N, taps] of the blur of clips; one tap of 1 where these are small."""
    taps = 2 * (min(clips.shape[-2:]) // 10 // 2) + 1
    apart = torch.arange(taps, device=sigma.device) - taps // 2
    return torch.softmax(-(apart**2) / (2 * sigma[:, None] ** 2), dim=1).to(clips.dtype)  # a Gaussian of sum 1


def _chosen_kernels(clips: torch.Tensor, sigma: torch.Tensor, where: torch.Tensor) -> list[Values | None]:
    """Return the same on the host; None for clips that stay sharp."""
    kernels = _kernels(clips, sigma)
    blurs = where & (kernels.shape[1] > 1)
    return [kernel if blurred else None for kernel, blurred in zip(kernels.numpy(), blurs.tolist(), strict=True)]


@dataclass(frozen=True)
class JitterDraws:
    """All that is random about one call of `ClipJitter`, for N clips of T frames.

    Attributes:
        factors: [4, N, T] of brightness, contrast, saturation and hue; 1, 1, 1 and 0 for clips
            without jitter.
        order: Places of the four operations, first applied first, for all clips.
        grey: Bool [N].
    """

    factors: torch.Tensor
    order: tuple[int, ...]
    grey: torch.Tensor

    def part(self, first: int, count: int) -> JitterDraws:
        """Return the draws of `count` of the clips."""
        some = slice(first, first + count)
        return JitterDraws(self.factors[:, some], self.order, self.grey[some])


@dataclass(frozen=True)
class ClipJitter:
    """Rules of MSCL's jitter and grey scale, each decided once for all frames of a clip.

    Blur and normalisation follow it and are no part of it. Source: MSCL's code
    (megvii-research/MSCL), written for kornia before 0.6: brightness is added, contrast multiplies,
    and saturation is that of HSV.

    Attributes:
        jitter: Probability of jitter.
        grey: Probability of grey scale, which comes after it.
        strength: Brightness, contrast and saturation factors are uniform in
            [1 - strength, 1 + strength].
        hue: The hue turns by a uniform share of a turn in [-hue, hue].
        sync: Factors of a "clip", or of each "frame" as in MSCL's published configuration.
    """

    jitter: float = 0.8
    grey: float = 0.2
    strength: float = 0.4
    hue: float = 0.1
    sync: Sync = "clip"

    def __post_init__(self) -> None:
        """ConfigError for values that mean nothing."""
        choice("sync", self.sync, ("clip", "frame"))
        for name in ("jitter", "grey", "strength"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} of the jitter must be from 0 to 1")

    def draw(self, clips: int, frames: int, *, generator: torch.Generator) -> JitterDraws:
        """Draw for that many clips of that many frames, on the generator's device."""
        device = generator.device
        chance = torch.rand(2, clips, generator=generator, device=device)
        drawn = frames if self.sync == "frame" else 1
        spread = torch.rand(4, clips, drawn, generator=generator, device=device)
        order = torch.randperm(4, generator=generator, device=device)
        factors = _factors(spread, (chance[0] < self.jitter)[:, None], strength=self.strength, hue=self.hue)
        return JitterDraws(factors.expand(-1, -1, frames), tuple(order.tolist()), chance[1] < self.grey)

    def apply(self, clips: torch.Tensor, draws: JitterDraws) -> torch.Tensor:
        """Change the colours of clips [N, T, 3, H, W] in [0, 1] as drawn; return the same shape."""
        factors = draws.factors.to(clips)[..., None, None, None]  # [4, N, T, 1, 1, 1]
        for place in draws.order:
            clips = _MSCL_OPERATIONS[place](clips, factors[place])
        return torch.where(_each(draws.grey.to(clips.device)), greyscale(clips), clips)


def add_brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Add factor - 1 to [..., 3, H, W], kept in [0, 1]."""
    return (images + (factor - 1)).clamp(0, 1)


def hsv_saturation(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply the saturation of [..., 3, H, W] by the factor, up to 1.

    Hue and value (HSV) are kept.
    """
    value, low = images.amax(-3, keepdim=True), images.amin(-3, keepdim=True)
    most = value / (value - low).clamp(min=torch.finfo(images.dtype).tiny)  # the factor that gives saturation 1
    return value - (value - images) * torch.minimum(factor.expand_as(most), most)


_MSCL_OPERATIONS = (add_brightness, brightness, hsv_saturation, hue)  # its contrast is what others call brightness
