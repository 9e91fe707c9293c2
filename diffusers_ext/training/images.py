"""Image data of a run: the arguments that describe it, loading it, and bringing it into the space that is diffused."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from diffusers_ext.data.exact import check_value_range
from diffusers_ext.data.sources import load_images

from .config import TrainConfig, described, require

__all__ = ["ExactImageArguments", "ImageConfig", "image_dataset"]

_data = partial(described, group="data")


@dataclass
class ImageConfig(TrainConfig):
    """Arguments of recipes that train on images, beside the engine's.

    Raises:
        ValueError: an argument is outside its range, or two contradict each other.
    """

    dataset_name: str | None = _data("Data set on the Hub; or give --train_data_dir.")
    dataset_config_name: str | None = _data("Its configuration.")
    train_data_dir: str | None = _data("Folder of images, saved data set, parquet or .npz file.")
    image_column: str = _data("Column of images.", "image")
    label_column: str | None = _data("Column of class labels; by default the data set's own, if it declares one.")
    resolution: int = _data("Images are resized and cropped to this many pixels a side.", 64)
    center_crop: bool = _data("Crop the centre instead of a random place.", False)
    random_flip: bool = _data("Mirror half of the images.", False)
    channels: Literal[1, 3] = _data("1 trains on grey images, 3 on colour.", 3)
    streaming: bool = _data("Read the data set as a stream; a resume then replays it up to its position.", False)
    max_train_samples: int | None = _data("Use only the first so many images.")
    require_captions: bool = _data("Stop where an image has no caption, or no line in the metadata.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise ValueError(
                "exactly one of `dataset_name` and `train_data_dir` must be given, got "
                f"{self.dataset_name!r} and {self.train_data_dir!r}."
            )
        if self.streaming:
            workers = self.dataloader_num_workers
            require(workers <= 1, "dataloader_num_workers", workers, "0 or 1 with `streaming`")
        samples = self.max_train_samples
        require(samples is None or samples >= 1, "max_train_samples", samples, "an integer >= 1 or left out")
        if self.train_data_dir is not None:
            data, output = Path(self.train_data_dir).resolve(), Path(self.output_dir).resolve()
            accepted = f"outside of `train_data_dir`, {str(data)!r}, whose files it would join"
            require(data not in (output, *output.parents), "output_dir", self.output_dir, accepted)
        require(self.resolution >= 1, "resolution", self.resolution, "an integer >= 1")

    def image_options(self) -> dict[str, Any]:
        """Returns further arguments of `load_images`, or others instead of those above; here none."""
        return {}


@dataclass
class ExactImageArguments:
    """Arguments of recipes that train on measured images, whose values and noise must stay as they are."""

    sigma_column: str | None = _data(
        "Column of each image's own noise level, 0 for a clean one, in units in which images lie in [-1, 1]."
    )
    value_range: str | None = _data(
        "The two values in the files that become -1 and 1, such as '0,4095'; by default 0 and the largest of uint8 or "
        "uint16, and 0 and 1 for floats. Values outside stay outside."
    )

    def exact_options(self) -> dict[str, Any]:
        """Returns the arguments of `load_images` that these describe.

        Raises:
            ValueError: `value_range` is not two numbers, low < high.
        """
        bounds = None
        if self.value_range is not None:
            try:
                low, high = (float(word) for word in self.value_range.split(","))
            except ValueError as error:
                accepted = "two numbers with a comma between them, low < high"
                raise ValueError(f"`value_range` must be {accepted}, got {self.value_range!r}.") from error
            bounds = low, high
            check_value_range(bounds)
        return {"exact": True, "value_range": bounds, "sigma_column": self.sigma_column}


def image_dataset(config: ImageConfig, verify: bool, caption_column: str | None = None, **options: Any) -> Any:
    """Loads the images that the arguments describe; see `load_images`.

    Args:
        config: the arguments.
        verify: open every file beforehand, so that a bad one is found before training.
        caption_column: column of captions.
        **options: further arguments of `load_images`, or others instead of the configuration's.
    """
    arguments: dict[str, Any] = {
        "train_data_dir": config.train_data_dir,
        "dataset_config_name": config.dataset_config_name,
        "image_column": config.image_column,
        "label_column": config.label_column,
        "caption_column": caption_column,
        "resolution": config.resolution,
        "center_crop": config.center_crop,
        "random_flip": config.random_flip,
        "channels": config.channels,
        "streaming": config.streaming,
        "max_train_samples": config.max_train_samples,
        "require_captions": config.require_captions,
    }
    data: Any = load_images(config.dataset_name, **{**arguments, **config.image_options(), **options})
    if verify and not config.streaming:
        data.verify()
    return data
