"""The noise of single pixels as a small network of normal noise, and fast samples of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

from diffusers_ext.hub.loading import SafeLoadingMixin
from diffusers_ext.training.config import require

__all__ = ["ISO_STOPS", "SensorNoiseProxy"]

# Thirds of a stop, at which the published networks have a correction each.
ISO_STOPS = (50, 64, 80, 100, 125, 160, 200, 250, 320, 400, 500, 640, 800, 1000, 1250, 1600, 2000, 2500, 3200, 4000,
             5000, 6400, 8000, 10000, 12800, 16000, 20000, 25600, 32000, 40000, 51200)  # fmt: skip
REACH = 6.0  # of the table, in standard deviations


class _Conv(nn.Module):
    """A convolution under the name that it has in the published weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(self.conv(x))


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _Conv(channels), _Conv(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(self.conv1(x))


def _network(channels: int, blocks: int) -> nn.Sequential:
    inner = [_Block(channels) for _ in range(blocks)]
    return nn.Sequential(nn.Conv2d(1, channels, 1), nn.SiLU(), *inner, nn.Conv2d(channels, 1, 1))


class SensorNoiseProxy(SafeLoadingMixin, ModelMixin, ConfigMixin):
    """A sensor's noise of single pixels, n = K(ISO) exp(c(ISO)) f1(z1) + f2(z2) in DN, z1 and z2 normal (PNNP).

    f1 and f2 are networks of 1x1 convolutions from one number to one number; weights have the names of the published
    ones (`proxy_pixel.nn_pre...` as `nn_pre...`). c is a straight line of ln ISO between calibrated ISOs, and constant
    outside of them; the authors' code takes the ISO's place one too high, and so extrapolates.

    Args:
        hidden_channels: channels of the networks.
        num_blocks: residual blocks of each.
        iso_to_gain: (k1, k0) of K = k1 ISO + k0, DN per electron.
        isos: at which c has a value of its own, rising; by default those of the published weights.
        calibrated_isos: those of `isos` that were trained; the others are left out. By default all.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> import torch
        >>> from diffusers_ext import SensorNoiseProxy
        >>> proxy = SensorNoiseProxy(iso_to_gain=(0.001, 0.0))
        >>> proxy.sample((4, 64, 64), iso=800, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([4, 64, 64])
    """

    __module__ = "diffusers_ext"

    config: Any
    ISO2K: torch.Tensor

    @register_to_config
    def __init__(
        self,
        hidden_channels: int = 16,
        num_blocks: int = 2,
        iso_to_gain: Sequence[float] = (0.0009546, -0.00193),
        isos: Sequence[float] = ISO_STOPS,
        calibrated_isos: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        require(hidden_channels >= 2, "hidden_channels", hidden_channels, "an integer >= 2")
        require(num_blocks >= 0, "num_blocks", num_blocks, "an integer >= 0")
        require(len(iso_to_gain) == 2, "iso_to_gain", iso_to_gain, "(k1, k0)")
        rising = all(a < b for a, b in zip((0, *isos), isos, strict=False))
        require(len(isos) > 0 and rising, "isos", list(isos), "rising numbers > 0")
        known = calibrated_isos is None or (len(calibrated_isos) > 0 and set(calibrated_isos) <= set(isos))
        require(known, "calibrated_isos", calibrated_isos, "some of `isos`, or left out")
        self.nn_pre = _network(hidden_channels, num_blocks)
        self.nn_fol = _network(hidden_channels, num_blocks)
        self.register_buffer("ISO2K", torch.tensor(iso_to_gain, dtype=torch.float32))
        self.scaler = nn.Parameter(torch.zeros(len(isos)))

    # -- gain ------------------------------------------------------------------------------------------------------

    def gain(self, iso: float | torch.Tensor) -> torch.Tensor:
        """Returns K(ISO) exp(c(ISO)), with a gradient for c.

        Args:
            iso: a number or `(batch,)`.

        Raises:
            ValueError: an ISO that is not above 0, or at which K is not.
        """
        iso = torch.as_tensor(iso, dtype=torch.float64)
        require(bool((iso > 0).all()), "iso", iso.tolist(), "above 0")
        slope, offset = self.ISO2K.double().tolist()
        gain = slope * iso + offset
        require(bool((gain > 0).all()), "iso", iso.tolist(), f"where {slope:g} ISO + {offset:g} is above 0")
        return gain.to(self.scaler.device, self.scaler.dtype) * self._correction(iso).exp()

    def _correction(self, iso: torch.Tensor) -> torch.Tensor:
        isos = list(self.config.isos)
        kept = [isos.index(i) for i in self.config.calibrated_isos or isos]
        values = self.scaler[kept]
        if len(kept) == 1:
            return values.expand(iso.shape)
        nodes = torch.tensor([isos[i] for i in kept], dtype=torch.float64).log()
        at = iso.cpu().log().clamp(nodes[0], nodes[-1])
        low = (torch.searchsorted(nodes, at, right=True) - 1).clamp(0, len(kept) - 2)
        share = ((at - nodes[low]) / (nodes[low + 1] - nodes[low])).to(values.device, values.dtype)
        low = low.to(values.device)
        return (1 - share) * values[low] + share * values[low + 1]

    # -- noise -----------------------------------------------------------------------------------------------------

    def forward(self, z1: torch.Tensor, z2: torch.Tensor, iso: float | torch.Tensor) -> torch.Tensor:
        """Makes noise of normal noise, by the networks.

        Args:
            z1: `(batch, ...)` of N(0, 1).
            z2: the same shape.
            iso: a number or `(batch,)`.

        Returns:
            The shape of `z1`, in DN.

        Raises:
            ValueError: unequal shapes, or a wrong ISO.
        """
        require(z1.shape == z2.shape, "z2", tuple(z2.shape), f"of the shape of `z1`, {tuple(z1.shape)}")
        return self._gain_of(iso, z1) * self.evaluate("nn_pre", z1) + self.evaluate("nn_fol", z2)

    def _gain_of(self, iso: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        gain = self.gain(iso)
        if gain.ndim == 1:
            batch = like.ndim > 0 and gain.numel() in (1, like.shape[0])
            require(batch, "iso", tuple(gain.shape), f"a number or one for each of the batch, {tuple(like.shape)}")
            gain = gain.reshape(-1, *[1] * (like.ndim - 1))
        return gain.to(like.dtype)

    def evaluate(self, network: str, z: torch.Tensor) -> torch.Tensor:
        """Calls one of the networks, `"nn_pre"` (f1) or `"nn_fol"` (f2), on numbers of any shape."""
        columns = 128 if z.numel() % 128 == 0 else 1  # an even shape is twice as fast on a CPU
        x = z.to(self.dtype).reshape(1, 1, -1, columns)
        return getattr(self, network)(x).reshape(z.shape).to(z.dtype)

    @torch.no_grad()
    def sample(
        self,
        shape: Sequence[int],
        iso: float | torch.Tensor,
        generator: torch.Generator | None = None,
        table: int | None = 4096,
    ) -> torch.Tensor:
        """Draws noise.

        Args:
            shape: of the result, `(batch, ...)`.
            iso: a number or `(batch,)`.
            generator: draws the normal noise, on its own device.
            table: take f1 and f2 from tables of so many places over +-6 with straight lines between them, which is
                ten times as fast and as exact; what is outside of it goes through the networks. `None` for the
                networks alone.

        Returns:
            `shape`, in DN, on the model's device, in float32.

        Raises:
            ValueError: a wrong ISO, or fewer than 2 places.
        """
        require(table is None or table >= 2, "table", table, "an integer >= 2 or None")
        device = self.device if generator is None else generator.device
        z = (torch.randn(tuple(shape), generator=generator, device=device).to(self.device) for _ in range(2))
        if table is None:
            return self(next(z), next(z), iso).float()
        gain = self._gain_of(iso, torch.empty(tuple(shape), device=self.device, dtype=torch.float32))
        noise = self._looked_up("nn_pre", next(z), table).mul_(gain)
        return noise.add_(self._looked_up("nn_fol", next(z), table))

    def _looked_up(self, network: str, z: torch.Tensor, size: int) -> torch.Tensor:
        nodes = torch.linspace(-REACH, REACH, size, dtype=torch.float64, device=z.device)
        values = self.evaluate(network, nodes)
        slopes = values.diff() / nodes.diff()
        starts = values[:-1] - slopes * nodes[:-1]
        flat = z.flatten()
        place = ((flat + REACH) * ((size - 1) / (2 * REACH))).to(torch.int32).clamp_(0, size - 2)
        found = starts.float().index_select(0, place)
        found.addcmul_(slopes.float().index_select(0, place), flat)
        outside = flat.abs() > REACH
        if outside.any():
            found[outside] = self.evaluate(network, flat[outside])
        return found.reshape(z.shape)

    # -- other weights ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start_at(self, gain_std: float, constant_std: float) -> None:
        """Makes f1 and f2 straight lines through 0, with a little of their first weights on top.

        Args:
            gain_std: slope of f1, in electrons.
            constant_std: slope of f2, in DN.
        """
        for network, std in ((self.nn_pre, gain_std), (self.nn_fol, constant_std)):
            first: Any = network[0]
            last: Any = network[-1]
            # silu(z) - silu(-z) = z, in two channels that the blocks leave as they are at first.
            first.weight[:2, 0, 0, 0] = torch.tensor([1.0, -1.0])
            first.bias[:2] = 0
            last.weight.mul_(0.05 * std)
            last.bias.zero_()
            last.weight[0, :2, 0, 0] = torch.tensor([std, -std])
            for block in network:
                if isinstance(block, _Block):
                    conv: Any = block.conv2.conv
                    conv.weight[:2] = 0
                    conv.bias[:2] = 0

    @classmethod
    def from_original_state_dict(
        cls, state: Mapping[str, torch.Tensor], calibrated_isos: Sequence[float] | None = None
    ) -> SensorNoiseProxy:
        """Makes the proxy of the authors' weights, as `torch.load("pw_iso_2stage_lowISO.pth", weights_only=True)`.

        Args:
            state: the weights by the authors' names, `proxy_pixel.nn_pre.0.weight` and so on.
            calibrated_isos: of the camera's dark frames; at others `scaler` is 0 in the weights, for nothing was
                learned there. By default those with another value than 0.

        Raises:
            ValueError: these are no such weights.
        """
        bare = {name.removeprefix("module.").removeprefix("proxy_pixel."): value for name, value in state.items()}
        first, scaler = bare.get("nn_pre.0.weight"), bare.get("scaler")
        named = first is not None and scaler is not None and scaler.numel() == len(ISO_STOPS) and "ISO2K" in bare
        require(named, "state", sorted(state)[:4], "weights with `proxy_pixel.nn_pre.0.weight`, `ISO2K` and `scaler`")
        assert first is not None
        assert scaler is not None
        trained = tuple(i for i, c in zip(ISO_STOPS, scaler.tolist(), strict=True) if c != 0)
        blocks = sum(name.startswith("nn_pre.") and name.endswith(".conv1.conv.weight") for name in bare)
        gain = tuple(bare["ISO2K"].tolist())
        proxy = cls(first.shape[0], blocks, gain, ISO_STOPS, calibrated_isos or trained or None)
        try:
            proxy.load_state_dict(bare)
        except RuntimeError as error:
            raise ValueError(f"`state` must hold the weights of PNNP's proxy of pixels: {error}") from error
        return proxy.eval()
