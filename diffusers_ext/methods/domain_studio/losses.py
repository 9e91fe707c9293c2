r"""Losses that tie the distances between adapted samples to those between source samples.

Rows over N images: \(S_i = \mathrm{softmax}_{j \ne i} \cos(v_i, v_j)\) with v a flattened image. The pair loss is the
mean over all N (N - 1) entries of \(p_s (\log p_s - \log p_a)\), on images and on their high frequencies; a further
loss compares high frequencies with those of the training image itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F

__all__ = ["DomainStudioLoss", "haar_high_frequency", "pairwise_log_similarity", "pairwise_similarity_loss"]


def haar_high_frequency(x: torch.Tensor, combine: Literal["sum", "none"] = "sum") -> torch.Tensor:
    """Computes the high-frequency part of images by a Haar transform, channel by channel.

    Args:
        x: `(batch, channels, height, width)`, both sizes even.
        combine: `"sum"` adds the bands LH, HL and HH up; `"none"` keeps them.

    Returns:
        `(batch, channels, height / 2, width / 2)`, or `(batch, channels, 3, height / 2, width / 2)`.

    Raises:
        ValueError: a size is odd, the numbers are integers, or `combine` is unknown.

    Reference:
        Zhu, Ma, Chen, Yuan, "DomainStudio", arXiv 2306.14153, section 4.2.

    Example:
        >>> import torch
        >>> from diffusers_ext import haar_high_frequency
        >>> haar_high_frequency(torch.tensor([[[[1.0, -1.0], [-1.0, 1.0]]]]))  # a chequered block is all HH
        tensor([[[[2.]]]])
    """
    if x.ndim != 4 or x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(f"`x` must be (batch, channels, even height, even width), got {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise ValueError(f"`x` must hold floating-point numbers, got {x.dtype}.")
    if combine not in ("sum", "none"):
        raise ValueError(f"`combine` must be 'sum' or 'none', got {combine!r}.")
    # The four pixels of every 2x2 block; slices are three times as fast as a convolution of one channel.
    a, b, c, d = x[:, :, ::2, ::2], x[:, :, ::2, 1::2], x[:, :, 1::2, ::2], x[:, :, 1::2, 1::2]
    if combine == "sum":
        return 1.5 * d - 0.5 * (a + b + c)
    return torch.stack([0.5 * (b + d - a - c), 0.5 * (c + d - a - b), 0.5 * (a + d - b - c)], 2)


def pairwise_log_similarity(x: torch.Tensor) -> torch.Tensor:
    """Computes, for every image, the log-softmax of its cosine similarities to all the others.

    Args:
        x: `(batch >= 2, ...)`, each row one image.

    Returns:
        `(batch, batch - 1)` in fp32; the columns of row i are the other images in order.

    Raises:
        ValueError: there are fewer than two images.

    Reference:
        DomainStudio, arXiv 2306.14153, eq. 4 and 5.

    Example:
        >>> import torch
        >>> from diffusers_ext import pairwise_log_similarity
        >>> pairwise_log_similarity(torch.eye(3)).exp()
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000],
                [0.5000, 0.5000]])
    """
    n = len(x)
    if n < 2:
        raise ValueError(f"`x` must hold at least 2 images, got {n}.")
    rows = F.normalize(x.float().flatten(1), dim=1)
    # Dropping the first of every n + 1 entries from the second on drops the diagonal.
    others = (rows @ rows.T).flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)
    return F.log_softmax(others, dim=1)


def pairwise_similarity_loss(
    adapted: torch.Tensor, source: torch.Tensor, reduction: Literal["elementwise", "batchmean"] = "elementwise"
) -> torch.Tensor:
    """Computes the divergence KL(source || adapted) of the two sets' relative similarities.

    Args:
        adapted: `(batch >= 2, ...)` images of the adapted model.
        source: `(batch, ...)` images of the source model, in the same order.
        reduction: `"elementwise"` is the mean over all `batch (batch - 1)` entries, as the authors have it;
            `"batchmean"` the mean over rows, `batch - 1` times as much.

    Returns:
        A scalar in fp32. With two images it is 0.

    Raises:
        ValueError: the numbers of images differ or are below 2, or `reduction` is unknown.

    Reference:
        DomainStudio, arXiv 2306.14153, eq. 6 and 7.

    Example:
        >>> import torch
        >>> from diffusers_ext import pairwise_similarity_loss
        >>> images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> pairwise_similarity_loss(images, 2 * images)  # cosines do not see scale
        tensor(0.)
    """
    if reduction not in ("elementwise", "batchmean"):
        raise ValueError(f"`reduction` must be 'elementwise' or 'batchmean', got {reduction!r}.")
    if len(adapted) != len(source):
        raise ValueError(f"`source` must hold {len(adapted)} images as `adapted`, got {len(source)}.")
    ours, theirs = pairwise_log_similarity(adapted), pairwise_log_similarity(source)
    divergence = F.kl_div(ours, theirs, log_target=True, reduction="sum")
    return divergence / (ours.numel() if reduction == "elementwise" else len(ours))


class DomainStudioLoss:
    """The three terms that DomainStudio adds to a denoising loss, weighted.

    Args:
        pair_weight: of the pair loss on images.
        hf_pair_weight: of the pair loss on high frequencies.
        hf_mse_weight: of the squared error of high frequencies to those of the training images.
        hf_mse_weighting: `"snr"` weights each image's squared error with min(SNR, 1), which keeps the noisiest
            timesteps from swamping everything; `"x0"` takes it as it is, like the authors.
        max_pair_timestep: images noisier than this timestep are left out of the pair losses.

    Raises:
        ValueError: a weight is no finite number >= 0, or the timestep no integer >= 0.

    Reference:
        DomainStudio, arXiv 2306.14153, eq. 13 for unconditional models, where the authors' code has the weights 4, 4
        and 1.

    Example:
        >>> import torch
        >>> from diffusers_ext import DomainStudioLoss
        >>> images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> terms = DomainStudioLoss()(images, images, images, snr=torch.ones(4), timesteps=torch.arange(4))
        >>> {name: round(value.item(), 6) for name, value in terms.items()}
        {'pair': 0.0, 'hf_pair': 0.0, 'hf_mse': 0.0}
    """

    def __init__(
        self,
        pair_weight: float = 4.0,
        hf_pair_weight: float = 4.0,
        hf_mse_weight: float = 1.0,
        hf_mse_weighting: Literal["snr", "x0"] = "snr",
        max_pair_timestep: int | None = None,
    ) -> None:
        self.weights = {"pair_weight": pair_weight, "hf_pair_weight": hf_pair_weight, "hf_mse_weight": hf_mse_weight}
        for name, value in self.weights.items():
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"`{name}` must be a number >= 0, got {value!r}.")
        if hf_mse_weighting not in ("snr", "x0"):
            raise ValueError(f"`hf_mse_weighting` must be 'snr' or 'x0', got {hf_mse_weighting!r}.")
        if max_pair_timestep is not None and (type(max_pair_timestep) is not int or max_pair_timestep < 0):
            raise ValueError(f"`max_pair_timestep` must be an integer >= 0 or left out, got {max_pair_timestep!r}.")
        self.hf_mse_weighting, self.max_pair_timestep = hf_mse_weighting, max_pair_timestep

    @property
    def pairs(self) -> bool:
        """Whether a pair loss has a weight, so that the source model is needed."""
        return self.weights["pair_weight"] > 0 or self.weights["hf_pair_weight"] > 0

    def __call__(
        self,
        adapted: torch.Tensor,
        source: torch.Tensor | None,
        target: torch.Tensor,
        *,
        snr: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> Mapping[str, torch.Tensor]:
        """Computes the weighted terms.

        Args:
            adapted: `(batch, channels, height, width)` clean images that the adapted model sees in the noisy ones.
            source: likewise of the source model; `None` where no pair loss has a weight.
            target: the training images.
            snr: `(batch,)` signal-to-noise ratios of the noisy images.
            timesteps: `(batch,)`, as the network is given them.

        Returns:
            `pair`, `hf_pair` and `hf_mse`, those with a weight; add them up.

        Raises:
            ValueError: sizes are odd, or the shapes differ.
        """
        if adapted.shape != target.shape or (source is not None and adapted.shape != source.shape):
            found = [tuple(images.shape) for images in (source, target) if images is not None]
            raise ValueError(f"`source` and `target` must have the shape {tuple(adapted.shape)}, got {found}.")
        terms, weights = {}, self.weights
        # Both losses on high frequencies take the adapted model's.
        needed = weights["hf_pair_weight"] or weights["hf_mse_weight"]
        high = haar_high_frequency(adapted.float()) if needed else adapted
        if self.pairs:
            if source is None:
                raise ValueError("`source` must be given where a pair loss has a weight, got None.")
            terms |= self._pair_terms(adapted, high, source, timesteps)
        if weights["hf_mse_weight"]:
            error = high - haar_high_frequency(target.float())
            each = error.square().flatten(1).mean(1)
            each = each * snr.clamp(max=1) if self.hf_mse_weighting == "snr" else each
            terms["hf_mse"] = weights["hf_mse_weight"] * each.mean()
        return terms

    def _pair_terms(
        self, adapted: torch.Tensor, high: torch.Tensor, source: torch.Tensor, timesteps: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        pair, hf = self.weights["pair_weight"], self.weights["hf_pair_weight"]
        if self.max_pair_timestep is not None:
            kept = timesteps <= self.max_pair_timestep
            adapted, high, source = adapted[kept], high[kept], source[kept]
        terms = {}
        few = len(adapted) < 2  # nothing is left to compare
        if pair:
            terms["pair"] = adapted.sum() * 0 if few else pair * pairwise_similarity_loss(adapted, source)
        if hf:
            theirs = haar_high_frequency(source.float())
            terms["hf_pair"] = adapted.sum() * 0 if few else hf * pairwise_similarity_loss(high, theirs)
        return terms
