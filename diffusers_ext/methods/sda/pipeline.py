"""A classifier made robust: labels of images, from the images as they came and as a diffusion model adapts them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from diffusers import DiffusionPipeline, ModelMixin, UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from transformers import PreTrainedModel
from typing_extensions import Self

from diffusers_ext.data.reading import read_images
from diffusers_ext.generation.stepping import callback_names, check_generator
from diffusers_ext.hub.loading import SafePipeline
from diffusers_ext.metrics.features import ImageClassifierFeatures

from .align import AlignConfig, align
from .ensemble import ENSEMBLES, Ensemble, ensemble_logits
from .lowpass import LowPass
from .shards import to_pil
from .views import classify, label_names

__all__ = ["SDATTAOutput", "SDATTAPipeline"]

Resize = Literal["crop", "squash", "none"]


@dataclass
class SDATTAOutput(BaseOutput):
    """What `SDATTAPipeline` returns.

    Attributes:
        labels: the name of each image's most probable class.
        label_ids: `(batch,)` its number.
        probabilities: `(batch, classes)`.
        logits: `(batch, classes)` of the ensemble.
        images: the adapted images, of the asked type; `None` with `ensemble="source"`.
    """

    labels: list[str]
    label_ids: torch.Tensor
    probabilities: torch.Tensor
    logits: torch.Tensor
    images: Any


class SDATTAPipeline(SafePipeline):
    """Classifies corrupted images by test-time adaptation with a diffusion model of the classifier's domain.

    Each image is noised and denoised under the guidance of its own low frequencies (DDA); the source classifier sees
    it as it came, a classifier fine-tuned on images that went the same way (SDA) sees it adapted, and their logits are
    added. No image's result depends on another's.

    Args:
        unet: an unconditional `UNet2DModel` on pixels.
        scheduler: the noise schedule that it was trained with.
        classifier: the source classifier: a transformers model for image classification, an `ImageClassifierFeatures`
            or any callable from images in [-1, 1] to logits, as a module of timm or torchvision or a function. `to`
            moves a plain module too, but only models of transformers and Diffusers are saved and offloaded, and stand
            in `components`.
        adapted_classifier: the fine-tuned one; by default the source classifier sees both views, which is DDA.
        image_processor: the classifiers' transformers image processor, for size, mean and deviation.
        alignment: the settings of `AlignConfig` to use by default, as a dict.

    Example:
        >>> import torch
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> from diffusers_ext import ImageClassifierFeatures, SDATTAPipeline
        >>> unet = UNet2DModel(
        ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=2,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        ... )
        >>> classifier = ImageClassifierFeatures(sample_size=8, block_out_channels=(4,), feature_dim=6).eval()
        >>> pipeline = SDATTAPipeline(unet, DDPMScheduler(), classifier, alignment={"num_steps": 10, "factor": 2})
        >>> pipeline.set_progress_bar_config(disable=True)
        >>> output = pipeline(torch.rand(2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
        >>> output.probabilities.shape, len(output.images)
        (torch.Size([2, 10]), 2)
    """

    __module__ = "diffusers_ext"

    unet: Any
    scheduler: Any
    classifier: Any
    adapted_classifier: Any
    image_processor: Any

    model_cpu_offload_seq = "unet->classifier->adapted_classifier"
    _optional_components = ["classifier", "adapted_classifier", "image_processor"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        # `from_pipe` takes over Diffusers models of the types that stand here only.
        classifier: ImageClassifierFeatures | PreTrainedModel | Callable[..., Any] | None = None,
        adapted_classifier: ImageClassifierFeatures | PreTrainedModel | Callable[..., Any] | None = None,
        image_processor: Any = None,
        alignment: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("classifier", classifier), ("adapted_classifier", adapted_classifier)):
            if value is not None and not callable(value):
                raise ValueError(f"`{name}` must be callable, got {type(value).__name__}.")
        self._check_models(unet, classifier, adapted_classifier, image_processor)
        settings = align_settings(alignment or {})
        self._callables: dict[str, Any] = {}
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            classifier=classifier if _is_model(classifier) else None,
            adapted_classifier=adapted_classifier if _is_model(adapted_classifier) else None,
            image_processor=image_processor,
        )
        self.classifier, self.adapted_classifier = classifier, adapted_classifier
        self.register_to_config(alignment={k: getattr(settings, k) for k in AlignConfig.__dataclass_fields__})
        self._num_timesteps, self._interrupt = 0, False
        self._filters: dict[Any, LowPass] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        # Diffusers holds, moves and saves models that know their device and dtype; other callables stand beside them.
        if name in ("classifier", "adapted_classifier"):
            self._callables[name] = None if _is_model(value) else value
            value = value if _is_model(value) else None
        super().__setattr__(name, value)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """Makes a pipeline of another's parts, as Diffusers does; classifiers that are plain callables come along."""
        plain = {k: v for k, v in getattr(pipeline, "_callables", {}).items() if v is not None}
        return super().from_pipe(pipeline, **{**plain, **kwargs})

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves the models as `DiffusionPipeline.to` does, and classifiers that are plain modules."""
        for value in self._callables.values():
            if isinstance(value, torch.nn.Module):
                value.to(*args, **{k: v for k, v in kwargs.items() if k in ("device", "dtype")})
        return super().to(*args, **kwargs)

    @staticmethod
    def _check_models(unet: Any, classifier: Any, adapted: Any, processor: Any) -> None:
        """Compares what the models' configurations say of channels, sizes and labels."""
        if not isinstance(unet.config.sample_size, int) or getattr(unet.config, "num_class_embeds", None):
            raise ValueError("`unet` must be unconditional, for square images, with an integer `sample_size`.")
        channels, size, labels = unet.config.in_channels, unet.config.sample_size, []
        for name, model in (("classifier", classifier), ("adapted_classifier", adapted)):
            config = getattr(model, "config", None)
            wanted = getattr(config, "num_channels", None) or getattr(config, "in_channels", None)
            if wanted is not None and wanted != channels and (processor is None or wanted != 3):
                raise ValueError(f"`{name}` must take {channels} channels like `unet`, got one for {wanted}.")
            side = getattr(config, "sample_size", None)
            if side is not None and side != size:
                raise ValueError(f"`{name}` must take images of {size} pixels like `unet`, got one for {side}.")
            labels.append(getattr(config, "id2label", None) or getattr(config, "num_classes", None))
        if labels[0] is not None and labels[1] is not None and labels[0] != labels[1]:
            raise ValueError(
                f"`adapted_classifier` must have the labels of `classifier`, {labels[0]}, got {labels[1]}."
            )

    @property
    def num_timesteps(self) -> int:
        """The number of network calls of the present call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has stopped the present call, by `pipeline._interrupt = True`."""
        return self._interrupt

    def _classifier(self, name: str) -> Any:
        plain = self._callables[name]
        return getattr(self, name) if plain is None else plain

    def check_inputs(
        self,
        ensemble: str,
        resize: str,
        output_type: str,
        batch_size: int | None,
    ) -> None:
        """Checks the arguments of a call.

        Raises:
            ValueError: one is wrong; the message names it.
        """
        if ensemble not in ENSEMBLES:
            raise ValueError(f"`ensemble` must be one of {list(ENSEMBLES)}, got {ensemble!r}.")
        missing = self._classifier("classifier") is None
        if missing and (ensemble != "adapted" or self._classifier("adapted_classifier") is None):
            raise ValueError("`classifier` must be given to the pipeline: this one has none.")
        if resize not in get_args(Resize):
            raise ValueError(f"`resize` must be one of {list(get_args(Resize))}, got {resize!r}.")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"`output_type` must be one of ['pil', 'np', 'pt'], got {output_type!r}.")
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f"`batch_size` must be an integer >= 1 or left out, got {batch_size!r}.")

    @torch.no_grad()
    def __call__(
        self,
        images: Any,
        ensemble: Ensemble = "sum",
        alignment: dict[str, Any] | None = None,
        resize: Resize = "crop",
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 - as in Diffusers, never changed
    ) -> SDATTAOutput | tuple[Any, ...]:
        """Adapts and classifies images.

        Args:
            images: a PIL image of any mode with a known range, an array `(height, width[, channels])` or `(batch,
                height, width, channels)`, a tensor `(channels, height, width)` or `(batch, channels, height, width)`,
                uint8, uint16 or floats in [0, 1], or a list of these.
            ensemble: how the two views are combined; see `ensemble_logits`. `"source"` calls no diffusion model.
            alignment: settings of `AlignConfig` for this call, over the pipeline's own.
            resize: images of another size than the diffusion model's are brought to it: `"crop"` resizes the shorter
                side and crops the centre, `"squash"` gives up the proportions, `"none"` refuses them.
            batch_size: images at a time, by default all.
            generator: one generator, or one an image; with one an image no result depends on the batch.
            output_type: of the adapted images: `"pil"`; `"np"` `(batch, height, width, channels)` or `"pt"` `(batch,
                channels, height, width)` in [0, 1].
            return_dict: return an `SDATTAOutput` instead of a tuple.
            callback_on_step_end: called as `(pipeline, step, timestep, {"latents": ...})` after every step; the
                latents it returns are used. `pipeline._interrupt = True` stops: what is not adapted by then is
                classified as it is. Diffusers' callbacks work.
            callback_on_step_end_tensor_inputs: names passed to it.

        Returns:
            `SDATTAOutput`, or its values as a tuple in the same order.

        Raises:
            ValueError: an argument is wrong; the message names it.
        """
        self.check_inputs(ensemble, resize, output_type, batch_size)
        tensors = callback_names(
            callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        )
        settings = align_settings({**self.config["alignment"], **(alignment or {})})
        x = to_tensor(images, self.unet.config.sample_size, self.unet.config.in_channels, resize)
        check_generator(generator, len(x))
        device = self._execution_device
        step = batch_size or len(x)
        self._num_timesteps, self._interrupt = settings.calls if ensemble != "source" else 0, False

        def report(index: int, timestep: int, z: torch.Tensor) -> torch.Tensor | None:
            bar.update()
            if callback_on_step_end is None:
                return None
            given = {name: z for name in tensors}
            return callback_on_step_end(self, index, timestep, given).get("latents", z)

        logits, adapted = [], []
        total = self._num_timesteps * -(-len(x) // step)
        with self.progress_bar(total=total) as bar:  # pyright: ignore[reportCallIssue]
            for first in range(0, len(x), step):
                part = x[first : first + step].to(device)
                own = generator[first : first + step] if isinstance(generator, list) else generator
                view = None
                if ensemble != "source":
                    view = (
                        part
                        if self._interrupt
                        else align(
                            self.unet,
                            self.scheduler,
                            part,
                            settings,
                            generator=own,
                            low_pass=self._filter(settings.factor, device),
                            callback=report,
                            interrupted=lambda: self._interrupt,
                        )
                    )
                    adapted.append(view)
                logits.append(self._logits(part, view, ensemble))
        result = torch.cat(logits)
        pictures = _as(output_type, torch.cat(adapted)) if adapted else None
        self.maybe_free_model_hooks()
        ids = result.argmax(1).cpu()
        named = self._classifier("classifier")
        names = label_names(self._classifier("adapted_classifier") if named is None else named, result.shape[1])
        output = SDATTAOutput([names[i] for i in ids.tolist()], ids, result.softmax(1), result, pictures)
        return output if return_dict else tuple(getattr(output, name) for name in SDATTAOutput.__dataclass_fields__)

    def _logits(self, images: torch.Tensor, adapted: torch.Tensor | None, ensemble: Ensemble) -> torch.Tensor:
        """Calls a classifier once for each view that the ensemble needs."""
        source, second = self._classifier("classifier"), self._classifier("adapted_classifier")
        if adapted is None:
            return classify(source, images, self.image_processor)
        of_adapted = classify(source if second is None else second, adapted, self.image_processor)
        if ensemble == "adapted":
            return of_adapted
        return ensemble_logits(classify(source, images, self.image_processor), of_adapted, ensemble)

    def _filter(self, factor: int, device: torch.device) -> LowPass:
        key = (factor, device)
        if key not in self._filters:
            self._filters[key] = LowPass(self.unet.config.sample_size, factor, device)
        return self._filters[key]


def _is_model(value: Any) -> bool:
    return isinstance(getattr(value, "_orig_mod", value), ModelMixin | PreTrainedModel)  # `torch.compile` wraps it


def align_settings(values: dict[str, Any]) -> AlignConfig:
    """Makes an `AlignConfig` of a dict; an unknown setting is a `ValueError`."""
    unknown = sorted(set(values) - set(AlignConfig.__dataclass_fields__))
    if unknown:
        raise ValueError(f"`alignment` must be settings of `AlignConfig`, got {unknown}.")
    return AlignConfig(**values)


def _as(output_type: str, images: torch.Tensor) -> Any:
    if output_type == "pil":
        return to_pil(images)
    pixels = (images.float() + 1) / 2
    return pixels if output_type == "pt" else pixels.permute(0, 2, 3, 1).cpu().numpy()


def to_tensor(images: Any, size: int, channels: int, resize: Resize = "crop") -> torch.Tensor:
    """Brings images of any kind to `(batch, channels, size, size)` in [-1, 1].

    Raises:
        ValueError: they are no images, or have another size with `resize="none"`.
    """
    return torch.stack([_resized(image, size, resize) * 2 - 1 for image in read_images(images, "images", channels)])


def _resized(pixels: torch.Tensor, size: int, resize: Resize) -> torch.Tensor:
    height, width = pixels.shape[1:]
    if (height, width) == (size, size):
        return pixels
    if resize == "none":
        raise ValueError(f"`images` must be {size} x {size} with `resize='none'`, got {height} x {width}.")
    scale = size / min(height, width)
    target = (
        (size, size) if resize == "squash" else (max(size, round(height * scale)), max(size, round(width * scale)))
    )
    pixels = torch.nn.functional.interpolate(pixels[None], target, mode="bicubic", antialias=True)[0].clamp(0, 1)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    return pixels[:, top : top + size, left : left + size]
