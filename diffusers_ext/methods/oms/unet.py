"""Networks without a time input: they work at one noise level only, that of pure noise."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import nn

from diffusers_ext.hub.loading import SafeLoadingMixin

__all__ = ["OMSUNet2DConditionModel", "OMSUNet2DModel"]


class _NoTime(nn.Module):
    """Stands in the place of a time embedding and adds nothing."""

    def __init__(self, value: float | None) -> None:
        super().__init__()
        self.value = value

    def forward(self, *_: Any) -> float | None:
        return self.value


def _without_time_projections(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, ResnetBlock2D):
            module.time_emb_proj = None
            module.time_embedding_norm = "default"  # without a shift the others are the same


class OMSUNet2DConditionModel(SafeLoadingMixin, UNet2DConditionModel):
    """`UNet2DConditionModel` without its time path, as the published One More Step modules are.

    Its weights have the names of `UNet2DConditionModel`, bar `time_embedding.*` and `*.time_emb_proj.*`; its output is
    that of a `UNet2DConditionModel` whose time weights are zero. Arguments are those of `UNet2DConditionModel`.

    Example:
        >>> import torch
        >>> from diffusers_ext import OMSUNet2DConditionModel
        >>> unet = OMSUNet2DConditionModel(
        ...     block_out_channels=(8, 8), norm_num_groups=2, cross_attention_dim=4, attention_head_dim=2,
        ...     down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        ...     up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ... )
        >>> unet(torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 4)).sample.shape
        torch.Size([1, 4, 8, 8])
    """

    __module__ = "diffusers_ext"

    @wraps(UNet2DConditionModel.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.class_embedding is not None or self.config["addition_embed_type"] is not None:
            raise ValueError(
                "`class_embed_type`, `num_class_embeds` and `addition_embed_type` must be None: they act through the "
                "time path, which this network does not have."
            )
        self.time_embedding = _NoTime(None)
        self.time_embed_act = None
        _without_time_projections(self)

    def get_time_embed(self, sample: torch.Tensor, timestep: Any) -> None:
        """Returns `None`: there is no time."""

    def forward(  # type: ignore[override]
        self, sample: torch.Tensor, encoder_hidden_states: torch.Tensor, return_dict: bool = True, **kwargs: Any
    ) -> UNet2DConditionOutput | tuple[torch.Tensor]:
        """Computes the v-prediction at pure noise, which is minus the conditional mean image.

        Args:
            sample: `(batch, channels, height, width)` pure noise.
            encoder_hidden_states: `(batch, tokens, cross_attention_dim)`.
            return_dict: return `UNet2DConditionOutput` instead of a tuple.
            **kwargs: as in `UNet2DConditionModel.forward`.
        """
        return super().forward(sample, 0, encoder_hidden_states, return_dict=return_dict, **kwargs)


class OMSUNet2DModel(SafeLoadingMixin, UNet2DModel):
    """`UNet2DModel` without its time path, for models of images without text; class labels stay possible.

    Arguments are those of `UNet2DModel`; with `num_class_embeds` the label's embedding takes the place of the time's.

    Example:
        >>> import torch
        >>> from diffusers_ext import OMSUNet2DModel
        >>> unet = OMSUNet2DModel(
        ...     in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=2, layers_per_block=1,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        ... )
        >>> unet(torch.zeros(1, 1, 8, 8)).sample.shape
        torch.Size([1, 1, 8, 8])
    """

    __module__ = "diffusers_ext"

    @wraps(UNet2DModel.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.class_embedding is None:
            self.time_embedding = _NoTime(None)
            _without_time_projections(self)
        else:
            self.time_embedding = _NoTime(0.0)  # the label's embedding is added to it

    def forward(  # type: ignore[override]
        self, sample: torch.Tensor, class_labels: torch.Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Computes the v-prediction at pure noise, which is minus the conditional mean image.

        Args:
            sample: `(batch, channels, height, width)` pure noise.
            class_labels: `(batch,)`, for a network with classes.
            return_dict: return `UNet2DOutput` instead of a tuple.
        """
        return super().forward(sample, 0, class_labels, return_dict=return_dict)
