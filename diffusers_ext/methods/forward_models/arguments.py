"""Arguments of training through a forward model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffusers_ext.training.config import described, is_range, require
from diffusers_ext.training.images import ImageConfig

__all__ = ["ForwardModelConfig"]


@dataclass
class ForwardModelConfig(ImageConfig):
    """Arguments of training a diffusion model of signals from observations of them.

    Raises:
        ValueError: an argument is outside its range, or two contradict each other.
    """

    forward_model: str | None = described(
        "Folder of a saved forward model, or the name of a shipped one (CropForwardModel ...).", group="model"
    )
    forward_model_config: str | None = described("JSON file of the arguments of a shipped one.", group="model")
    network: Literal["unet", "mlp"] = described(
        "A UNet2DModel that reads lifted observations, or an ObservationMLP.", "unet", group="model"
    )
    unet_config: str | None = described("JSON file of the network's arguments.", group="model")
    signal_shape: str | None = described(
        "Shape of a signal, such as '1,32,32'; with `simulated_views` that of the images.", group="model"
    )
    signal_range: str | None = described(
        "The two values of a signal that pictures show as black and white, such as '0,1': ends of ObservationMLP's "
        "sigmoid, and what images become with `simulated_views`.",
        group="model",
    )
    simulated_views: int | None = described(
        "The data are images, and are seen from so many views each; by default they are observations.", group="data"
    )
    observation_scale: float = described("What observations are multiplied by before they are noised.", 4.0)
    max_context_views: int = described("Context of 1 to so many observations; 0 trains without.", 3)
    max_given_views: int | None = described(
        "Of them the first 1 to so many are measured ones, the rest as if they were sampled; by default all."
    )
    num_targets: int = described("Noised observations, 1 to so many; joint sampling needs as many as views.", 1)
    novel_weight: float = described("Weight of the observation that is not shown; 0 leaves it out.", 1.0)
    observation_noise: float = described("Standard deviation of noise that measured context views get.", 0.0)
    context_noise: float = described("The same for the context views that stand for sampled ones.", 0.0)
    context_dropout: float = described("Probability of training a sample without its context, for guidance.", 0.1)
    regression: bool = described("The baseline: no noisy observation is shown, the mean signal is learned.", False)
    num_train_timesteps: int = described("Length of the cosine noise schedule.", 1000)
    validation_inference_steps: int = described("Sampling steps of validation pictures.", 50)
    num_validation_images: int = described("How many sample pictures to draw.", 8)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not self.streaming, "streaming", self.streaming, "False: observations are read by their places")
        for name, least in (("max_context_views", 0), ("num_targets", 1), ("num_train_timesteps", 1),
                            ("validation_inference_steps", 1)):  # fmt: skip
            require(getattr(self, name) >= least, name, getattr(self, name), f"an integer >= {least}")
        most, steps = self.num_train_timesteps, self.validation_inference_steps
        require(steps <= most, "validation_inference_steps", steps, f"at most `num_train_timesteps`, {most}")
        given = self.max_given_views
        accepted = f"an integer in 1..max_context_views, {self.max_context_views}, or left out"
        require(given is None or 1 <= given <= self.max_context_views, "max_given_views", given, accepted)
        views = self.simulated_views
        require(views is None or views >= 1, "simulated_views", views, "an integer >= 1 or left out")
        for name in ("novel_weight", "observation_noise", "context_noise"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "a number >= 0")
        require(self.observation_scale > 0, "observation_scale", self.observation_scale, "a number > 0")
        require(0 <= self.context_dropout < 1, "context_dropout", self.context_dropout, "a number in [0, 1)")
        accepted = "at least 1 with `regression`: without noisy views there is nothing else to go by"
        require(not self.regression or self.max_context_views >= 1, "max_context_views", 0, accepted)
        if views is None:
            require(self.signal_shape is not None, "signal_shape", None, "given, such as '1,32,32': observations do "
                    "not tell it")  # fmt: skip
        self.shape()
        self.range()

    def shape(self) -> tuple[int, ...]:
        """Returns the shape of a signal.

        Raises:
            ValueError: `signal_shape` is no list of whole numbers above 0.
        """
        if self.signal_shape is None:
            return self.channels, self.resolution, self.resolution
        words = self.signal_shape.split(",")
        good = all(word.strip().isdecimal() and int(word) > 0 for word in words)
        require(good, "signal_shape", self.signal_shape, "whole numbers > 0 with commas between them")
        return tuple(int(word) for word in words)

    def range(self) -> tuple[float, float] | None:
        """Returns the two numbers of `signal_range`.

        Raises:
            ValueError: they are no two rising numbers.
        """
        if self.signal_range is None:
            return None
        try:
            low, high = (float(word) for word in self.signal_range.split(","))
        except ValueError:
            low, high = 0.0, 0.0
        require(
            is_range((low, high)),
            "signal_range",
            self.signal_range,
            "two numbers with a comma between them, low < high",
        )
        return low, high

    @property
    def views_needed(self) -> int:
        """How many different observations of a signal a step takes."""
        return self.max_context_views + self.num_targets + (self.novel_weight > 0)
