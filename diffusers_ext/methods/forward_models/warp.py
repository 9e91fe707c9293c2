"""Motion: an image moved by a field of flow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config

from diffusers_ext.training.config import is_number, require

from .protocol import ForwardModel, Parameters
from .rays import centers

__all__ = ["WarpForwardModel"]


class WarpForwardModel(ForwardModel):
    """An image moved by a flow, O(x) = image(x - flow(x)), linear between pixels, the border repeated beyond it.

    The signal is the flow, `(batch, 2, height, width)`, to the right and down; a coarser one than the image is made
    finer, linearly between points of which the outer ones lie on the image's corners. Parameters of an observation:
    the image, `(batch, channels, height, width)`.

    Args:
        flow_scale: pixels of a signal of 1.

    Raises:
        ValueError: the scale is not above 0.

    Example:
        >>> import torch
        >>> from diffusers_ext import WarpForwardModel
        >>> flow = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 3, 3)  # a pixel to the right
        >>> WarpForwardModel()(flow, torch.arange(9.0).view(1, 1, 3, 3)).round()
        tensor([[[[0., 0., 1.],
                  [3., 3., 4.],
                  [6., 6., 7.]]]])
    """

    __module__ = "diffusers_ext"

    @register_to_config
    def __init__(self, flow_scale: float = 1.0) -> None:
        super().__init__()
        require(is_number(flow_scale) and flow_scale > 0, "flow_scale", flow_scale, "a number > 0")

    def forward(self, signal: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """Moves images.

        Args:
            signal: `(batch, 2, height, width)`, the flow / `flow_scale`.
            parameters: the images.

        Returns:
            `(batch, channels, height, width)`, as the images.

        Raises:
            ValueError: the signal is no flow.
        """
        assert isinstance(parameters, torch.Tensor)
        flow = signal.ndim == 4 and signal.shape[1] == 2
        require(flow, "signal", tuple(signal.shape), "a flow (batch, 2, height, width)")
        image = parameters.to(signal)
        height, width = image.shape[-2:]
        flow = signal * self.config.flow_scale
        if flow.shape[-2:] != image.shape[-2:]:
            flow = F.interpolate(flow, (height, width), mode="bilinear", align_corners=True)
        y, x = torch.meshgrid(centers(height, image), centers(width, image), indexing="ij")
        points = torch.stack([x - flow[:, 0] * (2 / width), y - flow[:, 1] * (2 / height)], -1)
        return F.grid_sample(image, points, padding_mode="border", align_corners=False)

    def lift(
        self, observation: torch.Tensor, parameters: Parameters, signal_shape: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gives both images, from which a network can see the flow; the gradient at flow 0 has a sign, no place.

        Args:
            observation: `(batch, channels, height, width)`.
            parameters: the images.
            signal_shape: not used.

        Returns:
            The observation and the image before it, `(batch, 2 channels, height, width)` in the images' size, and ones
            `(batch, 1, height, width)`.

        Raises:
            ValueError: the observation has another shape than its image.
        """
        assert isinstance(parameters, torch.Tensor)
        shape = tuple(parameters.shape)
        require(observation.shape == shape, "observation", tuple(observation.shape), str(shape))
        lifted = torch.cat([observation, parameters.to(observation)], 1)
        return lifted, torch.ones_like(observation[:, :1])

    def check_parameters(self, parameters: Parameters, n: int | None = None) -> None:
        """Refuses what are no images.

        Raises:
            ValueError: as said, or they are missing or not finite.
        """
        super().check_parameters(parameters, n)
        images = isinstance(parameters, torch.Tensor) and parameters.ndim == 4
        require(images, "parameters", type(parameters).__name__, "images (batch, channels, height, width)")
