"""Data sets of observations: the signals behind them are nowhere in them."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusers_ext.data.rows import read_rows
from diffusers_ext.rng import mix
from diffusers_ext.training.config import is_range, is_whole, require

from .objective import observe
from .protocol import ForwardModel, Parameters, map_parameters

__all__ = ["ObservationDataset", "SimulatedObservations"]

SIMULATION = 71  # first word of the seeds
PREFIX = "parameters."


class ObservationDataset:
    """Observations of signals, several of each, with the parameters of each observation.

    They are read from a `.npz` file of arrays, or by Hugging Face `datasets` from a saved data set, parquet files or
    the Hub: `observations` `(n, views, ...)` and `parameters` `(n, views, ...)`, or `parameters.NAME` for each of
    several. Items are dicts of `observations` `(views, ...)` in float32 and `parameters`, a tensor or a dict of them.

    Args:
        source: path of the file or folder, or a data set's name on the Hub.
        config_name: the Hub data set's configuration.
        split: its part, for `datasets`.
        max_samples: use only the first so many signals.

    Raises:
        ValueError: there is no such file, or an array is missing, of another length, or not finite.

    Example:
        >>> import numpy as np
        >>> from diffusers_ext import ObservationDataset
        >>> np.savez("views.npz", observations=np.zeros((5, 8, 1, 12)), parameters=np.zeros((5, 8)))  # doctest: +SKIP
        >>> ObservationDataset("views.npz")[0]["observations"].shape  # doctest: +SKIP
        torch.Size([8, 1, 12])
    """

    __module__ = "diffusers_ext"

    streaming = False

    def __init__(
        self, source: str | Path, config_name: str | None = None, split: str = "train", max_samples: int | None = None
    ) -> None:
        require(isinstance(source, str | Path) and str(source) != "", "train_data_dir", source, "a path or a name")
        require(
            max_samples is None or is_whole(max_samples), "max_samples", max_samples, "an integer >= 1 or left out"
        )
        path = Path(source)
        columns = _arrays(path) if path.suffix == ".npz" else _columns(str(source), config_name, split)
        _check_names(columns, str(source))
        columns = {name: values[:max_samples] if values.ndim else values for name, values in columns.items()}
        observations = columns["observations"]
        shape: tuple[int, ...] = tuple(observations.shape)
        require(len(shape) >= 3 and min(shape) >= 1, "observations", shape, "of shape (n, views, ...)")
        named = {name: values for name, values in columns.items() if name.startswith(PREFIX)}
        whole = columns.get("parameters")
        if (whole is None) == (not named):
            found = sorted(columns)
            raise ValueError(
                f"`train_data_dir` must hold either 'parameters' of each observation or several '{PREFIX}NAME', got "
                f"{str(source)!r} with {found}."
            )
        for name, values in {"observations": observations, "parameters": whole, **named}.items():
            if values is None:
                continue
            accepted = f"of shape {shape[:2]} and more: those of each observation"
            require(values.shape[:2] == shape[:2], name, tuple(values.shape), accepted)
            finite = bool(values.float().isfinite().all())
            require(finite, name, "NaN or infinite numbers", "finite in float32")
        self.observations = observations.float()
        self.parameters: Parameters = (
            _narrow(whole) if whole is not None else {n.removeprefix(PREFIX): _narrow(v) for n, v in named.items()}
        )
        count, views = observations.shape[:2]
        self.description = f"{count:,} signals, seen from {views} views each, from {path.name}"

    def __len__(self) -> int:
        """Returns the number of signals."""
        return len(self.observations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns an item; raises `IndexError` past the end, so that iteration ends."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} signals")
        return self.get(index)

    def get(self, index: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Returns an item; nothing is drawn."""
        return {
            "observations": self.observations[index],
            "parameters": map_parameters(lambda value: value[index], self.parameters),
        }


def _check_names(names: Iterable[str], source: str) -> None:
    if "observations" not in names:
        raise ValueError(
            f"`train_data_dir` must hold 'observations', got {source!r} with {sorted(names)}: images, which are seen "
            "through the forward model, need `simulated_views`."
        )


def _narrow(values: torch.Tensor) -> torch.Tensor:
    return values.float() if values.dtype == torch.float64 else values


def _arrays(path: Path) -> dict[str, torch.Tensor]:
    require(path.is_file(), "train_data_dir", str(path), "an existing file")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"`train_data_dir` must be a NumPy file of plain arrays (no pickled objects), got {str(path)!r}."
        ) from error
    for name, values in arrays.items():
        require(values.dtype.kind in "fiub", name, str(values.dtype), "numbers")
    return {name: torch.from_numpy(v.astype(v.dtype.newbyteorder("="))) for name, v in arrays.items()}


def _columns(source: str, config_name: str | None, split: str) -> dict[str, torch.Tensor]:
    path = Path(source)
    local = path.exists() or path.suffix == ".parquet"
    require(path.exists() or not local, "train_data_dir", source, "an existing file")
    try:
        rows, _ = read_rows(None if local else source, path if local else None, config_name, split)
    except Exception as error:  # the library raises many kinds
        accepted = "a data set that `datasets` reads: a saved one's folder, a parquet file or a name on the Hub"
        raise ValueError(f"`train_data_dir` must be {accepted}, got {source!r}: {error}") from error
    require(len(rows) > 0, "train_data_dir", source, "of one row or more")
    _check_names(rows.column_names, source)
    found = {}
    for name in rows.column_names:
        wanted = name in ("observations", "parameters") or name.startswith(PREFIX)
        if not wanted:
            continue
        values = rows[name][:]
        nested = isinstance(values[0], Mapping)
        parts = {f"{PREFIX}{key}": [v[key] for v in values] for key in values[0]} if nested else {name: values}
        for key, part in parts.items():
            try:
                found[key] = torch.as_tensor(np.asarray(part))
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"`{key}` must be numbers, of one shape in every row; several parameters of a view are columns "
                    f"'{PREFIX}NAME'."
                ) from error
    return found


class SimulatedObservations:
    """Observations that are made of images: each image is seen from the same few views in every epoch.

    Items are those of `ObservationDataset`; the images themselves are in none of them.

    Args:
        images: what `load_images` returns; with a random crop or flip each reading is of another signal.
        forward_model: observes signals of the images' shape.
        num_views: of each image.
        signal_range: the values of signals for black and white.
        seed: with the image's index, of the views' parameters.

    Raises:
        ValueError: there are no views, or another argument is wrong.

    Example:
        >>> from diffusers_ext import CropForwardModel, SimulatedObservations, load_images
        >>> from diffusers_ext.data.digits import DIGITS
        >>> digits = load_images(train_data_dir=str(DIGITS), resolution=28, channels=1, center_crop=True)
        >>> crops = SimulatedObservations(digits, CropForwardModel(size=14, sample_size=28), num_views=4)
        >>> crops[0]["observations"].shape, crops[0]["parameters"].shape
        (torch.Size([4, 1, 14, 14]), torch.Size([4, 2]))
    """

    __module__ = "diffusers_ext"

    streaming = False

    def __init__(
        self,
        images: Any,
        forward_model: ForwardModel,
        num_views: int,
        signal_range: tuple[float, float] = (-1.0, 1.0),
        seed: int = 0,
    ) -> None:
        require(is_whole(num_views), "num_views", num_views, "an integer >= 1")
        require(is_range(signal_range), "signal_range", signal_range, "two numbers, low < high")
        require(is_whole(seed, 0), "seed", seed, "an integer >= 0")
        name = type(forward_model).__name__
        require(isinstance(forward_model, ForwardModel), "forward_model", name, "a ForwardModel")
        self.images, self.forward_model, self.num_views, self.seed = images, forward_model, num_views, seed
        self.signal_range = signal_range
        self.description = f"{num_views} views each of {images.description}, made by {type(forward_model).__name__}"

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns an item; raises `IndexError` past the end, so that iteration ends."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        return self.get(index)

    @torch.no_grad()
    def get(self, index: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Returns an item; the generator draws the image's crop and flip alone."""
        low, high = self.signal_range
        signal = low + (high - low) * (self.images.get(index, generator)["pixel_values"] + 1) / 2
        own = torch.Generator().manual_seed(mix(self.seed, SIMULATION, index))
        parameters = self.forward_model.sample_parameters(self.num_views, own)
        self.forward_model.check_parameters(parameters, self.num_views)
        device = self.forward_model.device
        views = map_parameters(lambda value: value[None].to(device), parameters)
        seen = observe(signal[None].to(device), self.forward_model, views)[0]
        return {"observations": seen.cpu(), "parameters": map_parameters(lambda value: value.cpu(), parameters)}
