"""The representation of sound that is diffused: complex spectrograms with compressed magnitudes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image

from diffusers_ext.training.config import require

__all__ = ["Spectrogram"]


class Spectrogram:
    """Short-time Fourier transform with magnitudes `factor * |S| ** exponent`, and its inverse.

    Eq. 1 of SGMSE+ (2208.05830, section III-A): the window is a periodic Hann window, frames are centred.

    Args:
        sample_rate: of the sound, in Hz.
        n_fft: length of the window in samples, even; there are `n_fft // 2 + 1` bins.
        hop_length: samples from frame to frame, at most half a window.
        exponent: alpha, in (0, 1]: makes the magnitudes of speech less heavy-tailed.
        factor: beta, brings them to about [0, 1].

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> import torch
        >>> from diffusers_ext import Spectrogram
        >>> spectrogram = Spectrogram()
        >>> wave = torch.randn(16000)
        >>> coefficients = spectrogram.encode(wave)
        >>> coefficients.shape
        torch.Size([256, 126])
        >>> torch.allclose(spectrogram.decode(coefficients, 16000), wave, atol=1e-5)
        True
    """

    __module__ = "diffusers_ext"

    def __init__(
        self,
        sample_rate: int = 16000,
        n_fft: int = 510,
        hop_length: int = 128,
        exponent: float = 0.5,
        factor: float = 0.15,
    ) -> None:
        require(sample_rate >= 1, "sample_rate", sample_rate, "an integer >= 1")
        require(n_fft >= 4 and n_fft % 2 == 0, "n_fft", n_fft, "an even integer >= 4")
        require(1 <= hop_length <= n_fft // 2, "hop_length", hop_length, f"an integer in 1..{n_fft // 2}, n_fft / 2")
        require(0 < exponent <= 1, "exponent", exponent, "a number in (0, 1]")
        require(factor > 0, "factor", factor, "a number > 0")
        self.sample_rate, self.n_fft, self.hop_length = sample_rate, n_fft, hop_length
        self.exponent, self.factor = exponent, factor

    @property
    def bins(self) -> int:
        """Number of frequencies."""
        return self.n_fft // 2 + 1

    def frames(self, length: int) -> int:
        """Returns the number of frames of a wave of so many samples."""
        return max(length, self.n_fft // 2 + 1) // self.hop_length + 1

    def compress(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Compresses the magnitudes of an STFT: `factor * S * |S| ** (exponent - 1)`, 0 at 0."""
        return self.factor * coefficients.abs() ** self.exponent * torch.sgn(coefficients)

    def expand(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Inverts `compress`."""
        plain = coefficients / self.factor
        return plain * plain.abs() ** (1 / self.exponent - 1)

    def encode(self, wave: torch.Tensor) -> torch.Tensor:
        """Transforms waves to coefficients.

        Args:
            wave: `(..., samples)`, float; those of at most half a window are filled up with zeros.

        Returns:
            Complex `(..., bins, frames)`.
        """
        if wave.shape[-1] <= self.n_fft // 2:  # reflection needs more samples than it adds
            wave = F.pad(wave, (0, self.n_fft // 2 + 1 - wave.shape[-1]))
        flat = wave.reshape(-1, wave.shape[-1])
        found = torch.stft(
            flat, self.n_fft, self.hop_length, window=self._window(wave), center=True, return_complex=True
        )
        return self.compress(found).reshape(*wave.shape[:-1], *found.shape[-2:])

    def decode(self, coefficients: torch.Tensor, length: int) -> torch.Tensor:
        """Transforms coefficients to waves.

        Args:
            coefficients: complex `(..., bins, frames)`.
            length: samples to return; at most what the frames cover.

        Returns:
            `(..., length)`.
        """
        flat = self.expand(coefficients).reshape(-1, *coefficients.shape[-2:])
        wave = torch.istft(
            flat, self.n_fft, self.hop_length, window=self._window(flat.real), center=True, length=length
        )
        return wave.reshape(*coefficients.shape[:-2], length)

    def image(self, wave: torch.Tensor) -> Image.Image:
        """Draws a wave `(samples,)`, scaled to about 1: a column a frame, low frequencies at the bottom.

        What is bright is the root of the compressed magnitude, so that soft sounds are seen.
        """
        pixels = (self.encode(wave.float()).abs().sqrt().flip(0).clamp(0, 1) * 255).byte()
        return Image.fromarray(pixels.cpu().numpy())

    def _window(self, like: torch.Tensor) -> torch.Tensor:
        return torch.hann_window(self.n_fft, periodic=True, dtype=like.dtype, device=like.device)
