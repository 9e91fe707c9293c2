"""What a forward model is: the differentiable function from a signal and its parameters to an observation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin

from diffusers_ext.hub.loading import SafeLoadingMixin
from diffusers_ext.training.config import is_range, require

__all__ = ["ForwardModel", "Parameters", "check_differentiable", "map_parameters"]

# A tensor, or several by name; the first axis is the batch.
Parameters: TypeAlias = "torch.Tensor | Mapping[str, torch.Tensor]"


def _leaves(parameters: Parameters) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(parameters, Mapping):
        yield from ((f"parameters[{name!r}]", value) for name, value in parameters.items())
    else:
        yield "parameters", parameters


def map_parameters(function: Callable[..., torch.Tensor], *parameters: Parameters) -> Any:
    """Applies a function to each tensor of parameters.

    Args:
        function: of as many tensors as there are `parameters`.
        *parameters: alike in their names.

    Returns:
        Parameters with the same names.

    Raises:
        ValueError: they are not alike.

    Example:
        >>> import torch
        >>> from diffusers_ext import map_parameters
        >>> views = {"angle": torch.zeros(4, 3)}
        >>> map_parameters(lambda value: value[:, 0], views)["angle"].shape
        torch.Size([4])
    """
    first = parameters[0]
    if not isinstance(first, Mapping):
        tensors = all(not isinstance(other, Mapping) for other in parameters)
        require(tensors, "parameters", [type(other).__name__ for other in parameters], "all tensors or all dicts")
        return function(*parameters)
    names = set(first)
    require(len(names) > 0, "parameters", {}, "a tensor, or a dict of one or more")
    for other in parameters:
        alike = isinstance(other, Mapping) and set(other) == names
        require(alike, "parameters", sorted(other) if isinstance(other, Mapping) else "a tensor", str(sorted(names)))
    return {name: function(*(other[name] for other in parameters)) for name in first}  # type: ignore[index, call-overload]


def _outside_inference(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor that autograd may keep: those made in inference mode it refuses."""
    return tensor.clone() if tensor.is_inference() else tensor


def _precision(forward_model: ForwardModel) -> torch.dtype:
    """Signals are in fp32 or fp64, even where networks are in half precision."""
    return torch.promote_types(forward_model.dtype, torch.float32)


class ForwardModel(SafeLoadingMixin, ModelMixin, ConfigMixin):
    """A known, differentiable observation of a signal (2306.11719, section 3): `forward(signal, parameters)`.

    A forward model of your own needs `forward` alone; the rest has defaults. Arguments of its `__init__`, if it has
    one, are numbers, strings and lists under `@register_to_config`, so that it saves and loads.

    Example:
        >>> import torch
        >>> from diffusers_ext import ForwardModel
        >>> class Row(ForwardModel):
        ...     def forward(self, signal, parameters):  # parameters: (batch,) which row is seen
        ...         return signal[torch.arange(len(signal)), :, parameters]
        >>> seen, coverage = Row().lift(torch.ones(1, 3, 8), torch.tensor([2]), signal_shape=(3, 8, 8))
        >>> seen[0, 0, :4, 0]
        tensor([0., 0., 1., 0.])
    """

    __module__ = "diffusers_ext"

    config: Any
    placeholder: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        if not hasattr(self, "_internal_dict"):  # an own class without arguments
            self.register_to_config()
        # Without a tensor a model saves but does not load; it also says the device and dtype.
        self.register_buffer("placeholder", torch.zeros(()))

    def __call__(self, signal: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """Calls `forward` with one entry of the parameters for each signal; fewer would be broadcast unseen.

        Raises:
            ValueError: parameters are missing, or those of another number of observations.
        """
        require(isinstance(signal, torch.Tensor), "signal", type(signal).__name__, "a tensor (batch, ...)")
        self._check_batch(parameters, len(signal))
        return super().__call__(signal, parameters)

    def forward(self, signal: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """Observes signals.

        Args:
            signal: `(batch, channels, ...)`.
            parameters: of each signal's observation, such as a place, an angle or a camera; the first axis is the
                batch.

        Returns:
            `(batch, ...)`, differentiable in `signal`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `forward`.")

    def sample_parameters(self, n: int, generator: torch.Generator | None = None) -> Parameters:
        """Draws the parameters of `n` observations, on the CPU unless the generator is elsewhere.

        Raises:
            ValueError: the forward model has no way to draw them.
        """
        raise ValueError(
            f"{type(self).__name__} draws no parameters by itself: pass them, or write its `sample_parameters`."
        )

    def check_parameters(self, parameters: Parameters, n: int | None = None) -> None:
        """Refuses parameters that make no observation; what calls `forward` often calls this once before.

        Args:
            parameters: with the batch as first axis.
            n: size of the batch.

        Raises:
            ValueError: parameters are missing, not finite or outside of what the forward model takes.
        """
        self._check_batch(parameters, n)
        for name, value in _leaves(parameters):
            require(not value.is_complex(), name, str(value.dtype), "real numbers")
            finite = not value.is_floating_point() or bool(value.isfinite().all())
            require(finite, name, "NaN or infinite numbers", "finite")

    def _check_batch(self, parameters: Parameters, n: int | None) -> None:
        require(parameters is not None, "parameters", None, f"those of {type(self).__name__}")
        for name, value in _leaves(parameters):
            require(isinstance(value, torch.Tensor), name, type(value).__name__, "a tensor")
            require(value.ndim > 0, name, tuple(value.shape), "of shape (batch, ...)")
            accepted = f"one entry for each of {n} observations"
            require(n is None or len(value) == n, name, tuple(value.shape), accepted)

    def observation_shape(self, signal_shape: Sequence[int], parameters: Parameters) -> tuple[int, ...]:
        """Returns the shape of an observation without the batch.

        Args:
            signal_shape: of a signal, without the batch.
            parameters: of one or more observations.
        """
        one = map_parameters(lambda value: value[:1].to(self.device), parameters)
        # Signals are in fp32 beside networks of half precision too.
        dtype = _precision(self)
        with torch.no_grad():
            return tuple(self(torch.zeros(1, *signal_shape, dtype=dtype, device=self.device), one).shape[1:])

    def lift(
        self, observation: torch.Tensor, parameters: Parameters, signal_shape: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Brings observations into the signal's space, as a network of the signal reads them.

        By default the vector-Jacobian product at the signal 0, which is a linear model's adjoint.

        Args:
            observation: `(batch, ...)`.
            parameters: of each observation.
            signal_shape: of a signal, without the batch.

        Returns:
            The lifted observation and its coverage, which says where the observation looked: the lifted ones. Both
            `(batch, channels, ...)`; by default of the signal's shape.

        Raises:
            ValueError: `forward` is not differentiable, or the observation has another shape than `forward`'s.
        """
        with torch.inference_mode(False), torch.enable_grad():
            observation = _outside_inference(observation).detach()
            parameters = map_parameters(_outside_inference, parameters)
            shape = (len(observation), *signal_shape)
            zero = torch.zeros(shape, dtype=observation.dtype, device=observation.device, requires_grad=True)
            seen = self(zero, parameters)
            require(seen.shape == observation.shape, "observation", tuple(observation.shape), str(tuple(seen.shape)))
            both = [(observation, True), (torch.ones_like(observation), False)]
            lifted, coverage = (self._pulled_back(seen, zero, value, retain_graph=keep) for value, keep in both)
        return lifted, coverage

    def _pulled_back(
        self, seen: torch.Tensor, signal: torch.Tensor, weights: torch.Tensor, retain_graph: bool = False
    ) -> torch.Tensor:
        """Returns the vector-Jacobian product of `weights`, where there is one."""
        found = None
        if seen.grad_fn is not None:
            found = torch.autograd.grad(seen, signal, weights, retain_graph=retain_graph, allow_unused=True)[0]
        if found is None:
            raise ValueError(
                f"The forward model {type(self).__name__} is not differentiable: its observation has no gradient with "
                "respect to the signal. Write `forward` in torch operations, without `detach`, `no_grad` or rounding."
            )
        return found


def check_differentiable(
    forward_model: ForwardModel,
    signal_shape: Sequence[int],
    parameters: Parameters,
    signal_range: tuple[float, float] = (-1.0, 1.0),
    generator: torch.Generator | None = None,
) -> None:
    """Refuses a forward model from whose observations a signal cannot be learned, at a random signal.

    Args:
        forward_model: the forward model.
        signal_shape: of a signal, without the batch.
        parameters: of some observations.
        signal_range: of the signal's values.
        generator: draws the signal.

    Raises:
        ValueError: an argument is wrong, or the observation has no gradient, one that is 0 everywhere, or one with
            NaN; the message names the forward model.

    Example:
        >>> import torch
        >>> from diffusers_ext import CropForwardModel, check_differentiable
        >>> check_differentiable(CropForwardModel(size=2, sample_size=8), (1, 8, 8), torch.zeros(3, 2))
    """
    require(is_range(signal_range), "signal_range", signal_range, "two numbers, low < high")
    forward_model.check_parameters(parameters)
    name, low, high = type(forward_model).__name__, *signal_range
    n = len(next(_leaves(parameters))[1])
    device = forward_model.device

    def drawn(*shape: int) -> torch.Tensor:
        source = torch.device("cpu") if generator is None else generator.device
        return torch.rand(*shape, generator=generator, device=source).to(device, _precision(forward_model))

    with torch.inference_mode(False), torch.enable_grad():
        signal = (low + (high - low) * drawn(n, *signal_shape)).requires_grad_()
        seen = forward_model(signal, map_parameters(lambda value: _outside_inference(value).to(device), parameters))
        gradient = forward_model._pulled_back(seen, signal, drawn(*seen.shape))
    what = f"gradient of {name}"
    require(bool(gradient.isfinite().all()), what, "NaN or infinite numbers at a random signal", "finite")
    require(bool((gradient != 0).any()), what, "0 everywhere at a random signal", "different from 0 somewhere")
