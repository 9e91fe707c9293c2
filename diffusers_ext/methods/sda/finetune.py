"""Fine-tuning a classifier on aligned synthetic images, through the engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_ext.hub.card import RepoCard
from diffusers_ext.training.config import LRSchedule, described, require
from diffusers_ext.training.images import ImageConfig, image_dataset
from diffusers_ext.training.recipe import Context, Modules, Recipe, StepOutput

from .align_set import AlignmentArguments, diffusion_model
from .generate import load_pipeline
from .pipeline import SDATTAPipeline
from .shards import check_whole, to_pil
from .views import classify, load_classifier

__all__ = ["SDAClassifierConfig", "SDAClassifierRecipe"]

SNIPPET = """import diffusers_ext  # pip install diffusers-ext
from diffusers import DiffusionPipeline
from PIL import Image

pipeline = DiffusionPipeline.from_pretrained("{repo_id}")
print(pipeline(Image.open("corrupted.png")).labels)"""


@dataclass
class SDAClassifierConfig(AlignmentArguments, ImageConfig):
    """Arguments of the fine-tuning; optimiser and schedule are by default the paper's for ConvNeXt and Swin.

    `resolution` and `channels` follow the diffusion model. Give the alignment's settings as `align` had them: the
    finished pipeline keeps them.

    Raises:
        ValueError: an argument is outside its range, or two contradict each other.
    """

    pretrained_model_name_or_path: str = described(
        "Unconditional pipeline that aligned the images.", "", group="model"
    )
    classifier: str = described("Source classifier, a Hub repo or a folder.", "", group="model")
    head_only: bool = described("Train the last layer alone.", False)
    train_norm_statistics: bool = described("Let batch-norm statistics move; a small set spoils them.", False)
    label_smoothing: float = described("How much probability is spread over all classes.", 0.1)
    source_data_dir: str | None = described("Labelled source images to mix in.")
    source_fraction: float = described("Share of samples that are taken from them.", 0.0)
    learning_rate: float = described("Peak learning rate.", 2e-5)
    lr_scheduler: LRSchedule = described("Course of the learning rate over the updates.", "cosine")
    lr_warmup_steps: int = described("Updates of linear warm-up; the paper's are five of thirty epochs.", 0)
    adam_weight_decay: float = described("Weight decay.", 1e-8)
    max_grad_norm: float = described("Gradients are clipped to this norm.", 5.0)
    train_batch_size: int = described("Samples per process and micro-step.", 128)
    use_ema: bool = described("Keep an exponential moving average of the weights, and save that.", False)
    center_crop: bool = described("Crop the centre instead of a random place.", True)
    num_validation_images: int = described("How many aligned images the card shows.", 0)

    def __post_init__(self) -> None:
        if self.max_train_steps is None and self.num_train_epochs is None:
            self.num_train_epochs = 30
        ImageConfig.__post_init__(self)
        AlignmentArguments.__post_init__(self)
        require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "a number in [0, 1)")
        require(0 <= self.source_fraction < 1, "source_fraction", self.source_fraction, "a number in [0, 1)")
        mixes = self.source_data_dir is not None
        require(
            mixes or self.source_fraction == 0, "source_fraction", self.source_fraction, "0 without `source_data_dir`"
        )
        require(not self.streaming, "streaming", self.streaming, "False for classifiers")
        for name in ("pretrained_model_name_or_path", "classifier"):
            require(getattr(self, name) != "", name, getattr(self, name), "given: a Hub repo or a folder")


class _Mixture:
    """Samples of one data set, some replaced by samples of another."""

    streaming = False

    def __init__(self, data: Any, other: Any, fraction: float) -> None:
        self.data, self.other, self.fraction = data, other, fraction

    def __len__(self) -> int:
        return len(self.data)

    def get(self, index: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Returns the sample, or with probability `fraction` a random one of the other set."""
        if torch.rand(1, generator=generator) >= self.fraction:
            return self.data.get(index, generator)
        return self.other.get(int(torch.randint(len(self.other), (1,), generator=generator)), generator)


class SDAClassifierRecipe(Recipe[SDAClassifierConfig]):
    """SDA's fine-tuning (arXiv 2406.04295): the classifier learns aligned synthetic images and their labels.

    The result is an `SDATTAPipeline` with the source classifier and the fine-tuned one.

    Example:
        >>> from diffusers_ext import SDAClassifierConfig, SDAClassifierRecipe, Trainer
        >>> config = SDAClassifierConfig(
        ...     pretrained_model_name_or_path="my/unconditional", classifier="microsoft/resnet-50",
        ...     train_data_dir="runs/aligned",
        ... )
        >>> Trainer(config, SDAClassifierRecipe(config)).train()  # doctest: +SKIP
    """

    Config = SDAClassifierConfig

    def dataset(self, ctx: Context[SDAClassifierConfig]) -> Any:
        """Loads the aligned images, with source images among them if asked."""
        config = self.config
        if config.train_data_dir is not None:
            check_whole(config.train_data_dir)
        base = load_pipeline(config.pretrained_model_name_or_path, "no", "cpu")
        self.unet, self.scheduler, size, channels = diffusion_model(base)
        loaded = replace(config, resolution=size, channels=channels)
        data = image_dataset(loaded, verify=ctx.accelerator.is_main_process)
        if not data.num_classes:
            raise ValueError(
                f"`train_data_dir` must hold labelled images, got {config.train_data_dir!r} without labels."
            )
        self.data = data
        if config.source_data_dir is None or config.source_fraction == 0:
            return data
        source = replace(loaded, dataset_name=None, train_data_dir=config.source_data_dir)
        other = image_dataset(source, verify=ctx.accelerator.is_main_process)
        if other.class_names != data.class_names:
            raise ValueError(
                f"`source_data_dir` must have the classes {data.class_names} of `train_data_dir`, got "
                f"{other.class_names}."
            )
        return _Mixture(data, other, config.source_fraction)

    def setup(self, ctx: Context[SDAClassifierConfig]) -> Modules:
        """Loads the classifier twice: one to train, one to keep."""
        source, self.processor = load_classifier(self.config.classifier)
        model, _ = load_classifier(self.config.classifier)
        size, channels = self.unet.config.sample_size, self.unet.config.in_channels
        with torch.no_grad():
            classes = classify(source, torch.zeros(1, channels, size, size), self.processor).shape[1]
        if classes != self.data.num_classes:
            raise ValueError(
                f"`train_data_dir` must have the {classes} classes of `classifier`, got {self.data.num_classes}: "
                f"{self.data.class_names[:10]}."
            )
        names: dict[int, str] = getattr(model.config, "id2label", None) or {}
        given = self.data.class_names
        known = [str(names.get(i, i)) for i in range(classes)]
        if given != [str(i) for i in range(classes)] and sorted(given) == sorted(known) and given != known:
            raise ValueError(
                f"`train_data_dir` must have its classes in the classifier's order, {known}, got {given}."
            )
        if self.config.head_only:
            model.requires_grad_(False)
            [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1].requires_grad_(True)
        return Modules(model, self.scheduler, {"unet": self.unet, "classifier": source})

    def training_step(self, batch: dict[str, Any], ctx: Context[SDAClassifierConfig]) -> StepOutput:
        """Cross-entropy of aligned images."""
        if not self.config.train_norm_statistics:
            for module in ctx.model.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.eval()
        logits = classify(ctx.model, batch["pixel_values"], self.processor)
        loss = F.cross_entropy(logits, batch["label"], label_smoothing=self.config.label_smoothing)
        return StepOutput(loss, {"accuracy": (logits.detach().argmax(1) == batch["label"]).float().mean()})

    def pipeline(self, modules: Modules) -> SDATTAPipeline:
        """Returns the whole pipeline, ready to classify."""
        settings = self.config.alignment()
        return SDATTAPipeline(
            modules.frozen["unet"],
            modules.scheduler,
            modules.frozen["classifier"],
            modules.trainable,
            self.processor,
            alignment={name: getattr(settings, name) for name in settings.__dataclass_fields__},
        )

    def validate(self, pipeline: DiffusionPipeline, generator: torch.Generator) -> list[Image.Image]:
        """Returns the first training images."""
        count = min(self.config.num_validation_images, len(self.data))
        return to_pil(torch.stack([self.data.get(i)["pixel_values"] for i in range(count)]))

    def card(self) -> RepoCard:
        """Returns the card of the classifier."""
        return RepoCard(
            method="SDA test-time adaptation",
            description="Classifies corrupted images: a diffusion model pulls each one to the domain that the "
            "fine-tuned classifier has learned, and the source classifier sees it as it came.",
            data=self.data.description,
            tags=["diffusers-ext", "test-time-adaptation", "image-classification"],
            base_model=self.config.classifier,
            paper="https://arxiv.org/abs/2406.04295",
            snippet=SNIPPET,
            pipeline_tag="image-classification",
        )
