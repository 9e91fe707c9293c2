"""Arguments of training a text-to-image pipeline."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .config import described, require
from .lora import require_peft
from .noise import NoiseConfig
from .timesteps import Density

__all__ = ["TextToImageConfig"]


@dataclass
class TextToImageConfig(NoiseConfig):
    """Arguments of training a text-to-image pipeline, beside those of noise, data and engine.

    Raises:
        ValueError: an argument is outside its range, or two contradict each other.
    """

    pretrained_model_name_or_path: str | None = described(
        "Text-to-image pipeline to train, a Hub repo or a folder.", group="model"
    )
    pipeline_config: str | None = described(
        "Instead of it, a pipeline's folder whose network is made from its configuration and trained from scratch.",
        group="model",
    )
    call_options: str | None = described(
        "Further arguments of the pipeline's call in training and validation as a JSON object, such as "
        "'{\"max_sequence_length\": 512}'.",
        group="model",
    )
    quantization: Literal["4bit", "8bit"] | None = described(
        "Load the frozen network in 4 or 8 bits by bitsandbytes; with --lora_rank.", group="model"
    )
    lora_rank: int | None = described("Train LoRA layers of this rank by peft; by default the whole network.")
    lora_alpha: float | None = described("Their scale is alpha / rank; by default 1.")
    lora_targets: str | None = described(
        "Layers to adapt, names or ends of names, separated by commas; by default to_q,to_k,to_v,to_out.0."
    )
    use_dora: bool = described("Train the magnitude of each adapted layer too (DoRA).", False)
    guidance_scale: float | None = described(
        "For models that take the guidance scale as an input (Flux.1 dev): the one to train at; by default 1."
    )
    timestep_sampling: Density = described(
        "Density of the noise levels of flow matching, before the shift of the pipeline's schedule.", "uniform"
    )
    snr_gamma: float | None = described(
        "Min-SNR weighting with this bound (5 is usual) on a schedule of betas; by default none."
    )
    caption_column: str = described("Column of captions.", "text", group="data")
    caption_dropout: float = described("Probability of training an image without its caption, for guidance.", 0.1)
    aspect_ratio_buckets: bool = described(
        "Crop each image to the nearest of several sizes of about resolution x resolution pixels, instead of all to "
        "squares; a batch has one size.",
        False,
        group="data",
    )
    cache_latents: bool = described(
        "Encode all images before training, their centres if they are cropped; the autoencoder then leaves memory.",
        False,
        group="data",
    )
    cache_prompts: bool = described(
        "Encode all captions before training; the text encoders then leave memory.", False, group="data"
    )
    cache_dir: str | None = described("Folder of the two; by default in --output_dir.", group="data")
    instance_prompt: str | None = described("One caption for all images, for DreamBooth.", group="data")
    class_prompt: str | None = described(
        "DreamBooth: prompt of their class, of which the model keeps what it knows (prior preservation).", group="data"
    )
    class_data_dir: str | None = described("Folder of images of the class; what is missing is drawn.", group="data")
    num_class_images: int = described("How many of them there must be.", 100, group="data")
    prior_loss_weight: float = described("Weight of the loss on images of the class.", 1.0)
    validation_prompt: str | None = described(
        "Prompts of sample images, separated by semicolons; by default captions of the data."
    )
    validation_inference_steps: int = described("Sampling steps of sample images.", 28)
    validation_guidance_scale: float | None = described("Guidance of sample images; by default the pipeline's own.")
    learning_rate: float = described("Peak learning rate; 1e-5 suits whole networks.", 1e-4)
    train_batch_size: int = described("Samples per process and micro-step.", 4)
    resolution: int = described("Side of the images in pixels.", 512)
    num_validation_images: int = described("How many sample images to draw.", 4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.pretrained_model_name_or_path is None) == (self.pipeline_config is None):
            raise ValueError(
                "exactly one of `pretrained_model_name_or_path` and `pipeline_config` must be given, got "
                f"{self.pretrained_model_name_or_path!r} and {self.pipeline_config!r}."
            )
        folder = self.pipeline_config
        require(folder is None or Path(folder).is_dir(), "pipeline_config", folder, "an existing folder")
        self._check_lora()
        self._check_data()
        require(0 <= self.caption_dropout < 1, "caption_dropout", self.caption_dropout, "a number in [0, 1)")
        require(self.snr_gamma is None or self.snr_gamma > 0, "snr_gamma", self.snr_gamma, "a number > 0")
        steps = self.validation_inference_steps
        require(steps >= 1, "validation_inference_steps", steps, "an integer >= 1")
        words = self.validation_prompt
        require(words is None or bool(self.validation_prompts()), "validation_prompt", words, "a prompt, or several")
        self.call()

    def _check_lora(self) -> None:
        rank = self.lora_rank
        require(rank is None or rank >= 1, "lora_rank", rank, "an integer >= 1, or left out to train all weights")
        require(self.lora_alpha is None or self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "a number > 0")
        if rank is not None:
            require_peft()
        if rank is None:
            for name in ("lora_alpha", "lora_targets", "use_dora", "quantization"):
                value = getattr(self, name)
                require(value in (None, False), name, value, "left out without `lora_rank`: all weights are trained")
        elif self.pipeline_config is not None:
            raise ValueError(
                "`lora_rank` must be left out with `pipeline_config`: a new network has nothing to adapt."
            )

    def _check_data(self) -> None:
        require(not self.streaming, "streaming", self.streaming, "False: captions and sizes are read beforehand")
        require(self.channels == 3, "channels", self.channels, "3, as the pipelines' autoencoders take")
        flips = self.cache_latents and self.random_flip
        require(not flips, "random_flip", self.random_flip, "False with `cache_latents`")
        require(
            self.cache_dir is None or self.cache_latents or self.cache_prompts,
            "cache_dir",
            self.cache_dir,
            "left out without `cache_latents` and `cache_prompts`",
        )
        is_file = self.cache_dir is not None and Path(self.cache_dir).is_file()
        require(not is_file, "cache_dir", self.cache_dir, "a folder, which need not exist yet")
        self._check_prior()
        if self.prior and self.aspect_ratio_buckets:
            raise ValueError(
                "`aspect_ratio_buckets` must be False with `class_data_dir`: images of the class are squares."
            )
        require(self.num_class_images >= 1, "num_class_images", self.num_class_images, "an integer >= 1")
        folder = self.class_data_dir
        is_file = folder is not None and Path(folder).is_file()
        require(not is_file, "class_data_dir", folder, "a folder, which need not exist yet")
        for name in ("train_data_dir", "output_dir"):
            if self.class_data_dir is not None and getattr(self, name) is not None:
                ours, theirs = Path(getattr(self, name)).resolve(), Path(self.class_data_dir).resolve()
                apart = ours not in (theirs, *theirs.parents) and theirs not in ours.parents
                require(apart, "class_data_dir", self.class_data_dir, f"apart from `{name}`, {str(ours)!r}")

    def _check_prior(self) -> None:
        given = {n: getattr(self, n) for n in ("class_prompt", "class_data_dir") if getattr(self, n) is not None}
        if given and (len(given) < 2 or self.instance_prompt is None):
            raise ValueError(
                "`instance_prompt`, `class_prompt` and `class_data_dir` must be given together, got "
                f"{self.instance_prompt!r}, {self.class_prompt!r} and {self.class_data_dir!r}."
            )
        require(self.prior_loss_weight > 0, "prior_loss_weight", self.prior_loss_weight, "a number > 0")

    @property
    def prior(self) -> bool:
        """Whether images of the class are trained on."""
        return self.class_data_dir is not None

    @property
    def model_argument(self) -> tuple[str, str]:
        """The argument that names the pipeline, and its value."""
        name = "pipeline_config" if self.pretrained_model_name_or_path is None else "pretrained_model_name_or_path"
        return name, str(getattr(self, name))

    @property
    def targets(self) -> list[str] | None:
        """Names in `lora_targets`."""
        return None if self.lora_targets is None else [name.strip() for name in self.lora_targets.split(",")]

    def validation_prompts(self) -> list[str]:
        """Returns the prompts of sample images, none where the data's captions are taken."""
        return [prompt.strip() for prompt in (self.validation_prompt or "").split(";") if prompt.strip()]

    def call(self) -> dict[str, Any]:
        """Returns the further arguments of the pipeline's call.

        Raises:
            ValueError: `call_options` is no JSON object, or names the size.
        """
        try:
            options: Any = json.loads(self.call_options or "{}")
        except json.JSONDecodeError as error:
            raise ValueError(f"`call_options` must be a JSON object, got {self.call_options!r}: {error}") from error
        good = isinstance(options, dict) and not {"height", "width"} & options.keys()
        require(good, "call_options", self.call_options, "a JSON object without the size, which is `resolution`'s")
        return options
