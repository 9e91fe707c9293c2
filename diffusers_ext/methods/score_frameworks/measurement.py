r"""Linear measurements of images, \(Y = A x + n\), and the correction that they ask of a clean estimate.

Of an estimate with the error covariance \(r^2\) it is
\(A^T (A A^T + s/r^2)^{-1} (Y - A x_0) = (A^T A + s/r^2)^{-1} A^T (Y - A x_0)\), s the variance of one real number of
the noise: the posterior mean, were the error Gaussian and white. For Fourier samples it is closed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from diffusers_ext.generation.score_levels import as_real
from diffusers_ext.training.config import is_number, is_whole, require

__all__ = ["FourierSampling", "LinearOperator", "Solver", "conjugate_gradients"]

# (clean estimate, its error variance) -> correction
Solver = Callable[[torch.Tensor, float], torch.Tensor]


class LinearOperator:
    r"""A linear measurement that is given by a function and its adjoint; it is inverted by conjugate gradients.

    Args:
        forward: x `(batch, channels, height, width)`, real -> `(batch, ...)`, real or complex.
        adjoint: back; \(\mathrm{Re} \langle A x, y \rangle = \langle x, A^T y \rangle\). Of a complex result the real
            part is taken.
        max_iterations: of conjugate gradients, at each step.
        tolerance: of the residual, in the norm of the right side, at which they stop.

    Raises:
        ValueError: an argument is of another kind or outside its range.

    Example:
        >>> import torch
        >>> from diffusers_ext import LinearOperator
        >>> halves = LinearOperator(lambda x: x[..., ::2], lambda y: torch.stack([y, 0 * y], -1).flatten(-2))
        >>> halves.forward(torch.arange(4.0).view(1, 1, 1, 4))
        tensor([[[[0., 2.]]]])
    """

    def __init__(
        self,
        forward: Callable[[torch.Tensor], torch.Tensor],
        adjoint: Callable[[torch.Tensor], torch.Tensor],
        max_iterations: int = 100,
        tolerance: float = 1e-6,
    ) -> None:
        for name, function in (("forward", forward), ("adjoint", adjoint)):
            if not callable(function):
                raise ValueError(f"`{name}` must be a function of a tensor, got {function!r}.")
        require(is_whole(max_iterations), "max_iterations", max_iterations, "an integer >= 1")
        require(is_number(tolerance) and tolerance > 0, "tolerance", tolerance, "a number > 0")
        self._forward, self._adjoint = forward, adjoint
        self.max_iterations, self.tolerance = max_iterations, tolerance

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Measures images without noise."""
        return self._forward(image)

    def adjoint(self, measurement: torch.Tensor) -> torch.Tensor:
        """Returns the adjoint's images, real."""
        image = self._adjoint(measurement)
        return image.real if image.is_complex() else image

    def check(self, measurement: torch.Tensor) -> tuple[int, ...]:
        """Checks a measurement, and that the adjoint is one.

        Returns:
            The shape of the images behind it, `(batch, channels, height, width)`.

        Raises:
            ValueError: it is no tensor of finite numbers of the kind and shape that `forward` returns, or the adjoint
                belongs to another function.
        """
        tensor = isinstance(measurement, torch.Tensor) and measurement.ndim >= 2 and measurement.numel() > 0
        if not tensor or not (measurement.is_floating_point() or measurement.is_complex()):
            raise ValueError(f"`measurement` must be floats or complex, (batch, ...), got {_kind(measurement)}.")
        if not bool(torch.isfinite(measurement).all()):
            raise ValueError("`measurement` must be finite, got NaN or infinity.")
        try:
            image = self.adjoint(measurement)
            noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0)).to(image)
            expected = self.forward(noise)
            there, back = (expected.conj() * expected).real.sum(), (noise * self.adjoint(expected)).sum()
        except Exception as error:  # functions of one's own raise many kinds
            raise ValueError(
                f"`measurement` must be what `operator` makes of images, got {_kind(measurement)}: {error}"
            ) from error
        if image.ndim != 4 or expected.shape != measurement.shape or expected.is_complex() != measurement.is_complex():
            raise ValueError(
                f"`measurement` must be {_kind(expected)}, as `operator` makes it, got {_kind(measurement)}."
            )
        if not torch.isclose(there, back, rtol=1e-3):
            raise ValueError(
                "`operator` must have an adjoint with <A x, A x> = <x, A^T A x>, got one with "
                f"{float(there):.5g} and {float(back):.5g}."
            )
        return tuple(image.shape)

    def solver(self, measurement: torch.Tensor, noise_std: float) -> Solver:
        """Returns the correction that a measurement asks of estimates.

        Args:
            measurement: `(batch, ...)`, as of `forward`.
            noise_std: root of the mean square of its noise; of a complex number both parts together.

        Returns:
            A function of the estimate and the variance of its error, > 0, that returns what is to be added to it.
        """
        variance = noise_std**2 / (2 if measurement.is_complex() else 1)

        def correction(clean: torch.Tensor, error: float) -> torch.Tensor:
            def normal(x: torch.Tensor) -> torch.Tensor:
                return self.adjoint(self.forward(x)) + variance / error * x

            # Of images rather than measurements: these have a solution also where no image gives the measurement.
            missing = self.adjoint(measurement - self.forward(clean))
            return conjugate_gradients(normal, missing, self.max_iterations, self.tolerance)

        return correction


class FourierSampling(LinearOperator):
    r"""Samples of images' Fourier coefficients, \(Y = M (F x + n)\), as magnetic resonance scanners take them.

    F is unitary (`torch.fft.fft2` with `norm="ortho"`), n complex noise. The images are real, so that
    \(F x(-k) = \overline{F x(k)}\): a coefficient tells that of -k too, and where both are measured their mean has
    half the noise. `complete` does this; a reconstruction from what was measured alone would count lines without their
    mirror half.

    Args:
        mask: `(height, width)` or `(width,)` for whole columns: 1 where coefficients are measured, 0 elsewhere. The
            coefficient of frequency 0 comes first, as `fft2` has it; bring a centred mask there by
            `torch.fft.ifftshift`.
        sensitivity_maps: `(coils, height, width)`, complex: images of one channel are multiplied by each coil's map
            before F. Reconstruction is then by conjugate gradients.

    Raises:
        ValueError: the mask holds other than 0 and 1 or nothing is of its shape, or the maps are of another.

    Example:
        >>> import torch
        >>> from diffusers_ext import FourierSampling
        >>> operator = FourierSampling(torch.tensor([1, 1, 0, 0, 0, 0, 0, 0]))
        >>> kspace = operator.forward(torch.rand(1, 1, 8, 8))
        >>> completed, variance = operator.complete(kspace, noise_std=0.1)
        >>> variance[0]  # of columns 0, its own mirror, and 1; column 7 is the mirror of 1
        tensor([0.0050, 0.0100,    inf,    inf,    inf,    inf,    inf, 0.0100])
    """

    def __init__(self, mask: torch.Tensor, sensitivity_maps: torch.Tensor | None = None) -> None:
        super().__init__(self._sample, self._fill)
        mask = as_real("mask", mask)
        if mask.ndim == 1:
            mask = mask.expand(len(mask), -1)
        if mask.ndim != 2 or mask.numel() == 0:
            raise ValueError(f"`mask` must have the shape (height, width) or (width,), got {tuple(mask.shape)}.")
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"`mask` must hold 0 and 1 alone, got {mask.unique().tolist()[:5]}.")
        self.mask = mask.bool()
        self.sensitivity_maps = None
        if sensitivity_maps is not None:
            maps = sensitivity_maps
            tensor = isinstance(maps, torch.Tensor) and maps.numel() > 0 and bool(maps.isfinite().all())
            require(tensor, "sensitivity_maps", _kind(maps), "a tensor of finite numbers")
            if maps.ndim != 3 or maps.shape[1:] != mask.shape:
                accepted = f"(coils, {mask.shape[0]}, {mask.shape[1]}), as the mask"
                raise ValueError(f"`sensitivity_maps` must have the shape {accepted}, got {tuple(maps.shape)}.")
            self.sensitivity_maps = maps.to(torch.promote_types(maps.dtype, torch.complex64))

    def _sample(self, image: torch.Tensor) -> torch.Tensor:
        maps = self.sensitivity_maps
        one = maps is None or image.shape[1] == 1
        require(one, "image", tuple(image.shape), "of one channel, which the coils' maps multiply")
        image = image if maps is None else image * maps.to(image.device)
        return torch.fft.fft2(image, norm="ortho") * self.mask.to(image.device)

    def _fill(self, measurement: torch.Tensor) -> torch.Tensor:
        maps = self.sensitivity_maps
        image = torch.fft.ifft2(measurement * self.mask.to(measurement.device), norm="ortho")
        return image.real if maps is None else (maps.to(image.device).conj() * image).real.sum(1, keepdim=True)

    def check(self, measurement: torch.Tensor) -> tuple[int, ...]:
        """Checks k-space; see `LinearOperator.check`.

        Raises:
            ValueError: also where it is real, or of another size than the mask.
        """
        self._check_kspace(measurement)
        return super().check(measurement)

    def _check_kspace(self, measurement: torch.Tensor) -> None:
        if not isinstance(measurement, torch.Tensor) or not measurement.is_complex():
            raise ValueError(f"`measurement` must be complex, as k-space is, got {_kind(measurement)}.")
        if measurement.shape[-2:] != self.mask.shape:
            size = tuple(self.mask.shape)
            raise ValueError(f"`measurement` must be of the mask's size, {size}, got {_kind(measurement)}.")

    def complete(self, measurement: torch.Tensor, noise_std: float) -> tuple[torch.Tensor, torch.Tensor]:
        r"""Fills k-space by its symmetry, \(Y(-k) = \overline{Y(k)}\); of what is measured twice takes the mean.

        Args:
            measurement: `(batch, channels, height, width)`, complex; what the mask leaves out is not looked at.
            noise_std: root of the mean square of the noise of a coefficient.

        Returns:
            The completed k-space, 0 where nothing is known, and the variance of the noise of each coefficient,
            `(height, width)`, infinite there.

        Raises:
            ValueError: there are sensitivity maps, which make the images complex, or an argument is wrong.
        """
        self._check_kspace(measurement)
        require(is_number(noise_std) and noise_std >= 0, "noise_std", noise_std, "a number >= 0")
        if self.sensitivity_maps is not None:
            raise ValueError("`sensitivity_maps` must be left out: images times maps have no such symmetry.")
        mask = self.mask.to(measurement.device)
        counts = mask.float() + _mirrored(mask).float()
        known = measurement * mask
        completed = (known + _mirrored(known).conj()) / counts.clamp(min=1)
        variance = noise_std**2 / counts
        return completed, torch.where(counts > 0, variance, torch.inf)

    def solver(self, measurement: torch.Tensor, noise_std: float) -> Solver:
        """Returns the correction that k-space asks of estimates; see `LinearOperator.solver`."""
        if self.sensitivity_maps is not None:
            return super().solver(measurement, noise_std)
        completed, variance = self.complete(measurement, noise_std)

        def correction(clean: torch.Tensor, error: float) -> torch.Tensor:
            weight = 1 / (1 + variance / error)  # 0 of an infinite variance
            missing = completed - torch.fft.fft2(clean, norm="ortho")
            return torch.fft.ifft2(weight * missing, norm="ortho").real

        return correction


def conjugate_gradients(
    apply: Callable[[torch.Tensor], torch.Tensor], right: torch.Tensor, max_iterations: int, tolerance: float
) -> torch.Tensor:
    """Solves `apply(x) = right` for each sample of a batch.

    Args:
        apply: symmetric, and positive where the right side lies.
        right: `(batch, ...)`.
        max_iterations: at most so many calls of `apply`.
        tolerance: of the residual, in the right side's norm.
    """

    def inner(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (u * v).flatten(1).sum(1).view(-1, *[1] * (u.ndim - 1))

    x, residual = torch.zeros_like(right), right
    direction, size = residual, inner(residual, residual)
    least = tolerance**2 * size
    for _ in range(max_iterations):
        if bool((size <= least).all()):
            break
        moved = apply(direction)
        active = size > least  # a sample that is done stays as it is
        step = torch.where(active, size / inner(direction, moved).clamp(min=torch.finfo(size.dtype).tiny), 0.0)
        x = x + step * direction
        residual = residual - step * moved
        new = torch.where(active, inner(residual, residual), size)
        direction = torch.where(active, residual + new / size.clamp(min=1e-38) * direction, direction)
        size = new
    return x


def _mirrored(kspace: torch.Tensor) -> torch.Tensor:
    """Returns the value at -k for each k."""
    return kspace.flip(-2, -1).roll((1, 1), (-2, -1))


def _kind(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return type(value).__name__
