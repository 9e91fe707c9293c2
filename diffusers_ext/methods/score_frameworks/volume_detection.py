"""Anomaly maps of whole volumes, file by file: what is finished stays, and a restart does the rest."""

from __future__ import annotations

import csv
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from diffusers_ext.data.cache import fingerprint
from diffusers_ext.rng import mix
from diffusers_ext.training.config import is_whole, require
from diffusers_ext.training.results import check_settings, read_json, write_json

from .pipeline_anomaly import AnomalyDetectionPipeline, call_settings
from .volumes import VolumeSlices, check_slicing, count_slices, open_volume, read_slices

__all__ = ["detect_in_volumes"]

KINDS = (".nii.gz", ".nii")
VOLUMES = 63  # first word of the seeds
COLUMNS = ("volume", "score", "mask_ml", "i", "j", "k", "slices")


def detect_in_volumes(
    pipeline: AnomalyDetectionPipeline,
    volumes: str | Path | Sequence[str | Path],
    output_dir: str | Path,
    size: int | None = None,
    axis: str = "axial",
    field_of_view: float | None = None,
    percentile: float = 99.5,
    batch_size: int = 16,
    seed: int = 0,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Finds what does not belong in volumes, slice by slice, and keeps maps, masks and scores.

    A volume is finished when its record is written; a run that was stopped goes on with those that are not, or that
    are newer than their record. A result depends on the file, its name and the settings, not on where a run was
    stopped. For research, not for diagnosis.

    Args:
        pipeline: its network was trained on such slices of healthy volumes (`read_slices`).
        volumes: NIfTI files (.nii, .nii.gz), and folders of which all are taken.
        output_dir: for results. Of `NAME.nii` or `NAME.nii.gz` there are `NAME_map.nii.gz`, with a threshold
            `NAME_mask.nii.gz`, both on the volume's own grid, and `NAME.json`; of all, `scores.csv`.
        size: pixels a side of the slices, by default the network's `sample_size`.
        axis: as in `read_slices`.
        field_of_view: likewise.
        percentile: likewise.
        batch_size: slices at a time.
        seed: each slice has its own random numbers from it, the volume's name and its place.
        **settings: of the pipeline's call: `strength`, `num_inference_steps`, `num_samples`, `noise`, `score`,
            `smoothing`, `threshold`.

    Returns:
        A record a volume, which its JSON file holds too: `volume`, the name; `score`, the largest value of its
        slices' maps; `slice_scores`, that of each slice, in the order of `read_slices`; `peak`, the indices of the
        voxel of the file whose map is the largest; `mask_ml`, millilitres in the mask, `None` without a threshold.

    Raises:
        ValueError: an argument is wrong, the folder holds results of other settings, or volumes could not be read; of
            a folder's volumes the others are finished first.

    Example:
        >>> import tempfile, nibabel, numpy as np
        >>> from diffusers import DDIMScheduler, UNet2DModel
        >>> from diffusers_ext import AnomalyDetectionPipeline, detect_in_volumes
        >>> unet = UNet2DModel(
        ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=2,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        ... )
        >>> pipeline = AnomalyDetectionPipeline(unet, DDIMScheduler())
        >>> folder = tempfile.mkdtemp()
        >>> nibabel.save(nibabel.Nifti1Image(np.random.rand(10, 12, 3), np.eye(4)), f"{folder}/head.nii.gz")
        >>> found = detect_in_volumes(pipeline, folder, f"{folder}/found", num_inference_steps=2, threshold=0.5)
        >>> found[0]["volume"], len(found[0]["slice_scores"])
        ('head', 3)
        >>> nibabel.load(f"{folder}/found/head_map.nii.gz").shape
        (10, 12, 3)
    """
    require(isinstance(pipeline, AnomalyDetectionPipeline), "pipeline", pipeline, "an AnomalyDetectionPipeline")
    for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
        require(is_whole(value, least), name, value, f"an integer >= {least}")
    places = volumes if isinstance(volumes, list | tuple) else [volumes]
    require(all(isinstance(place, str | Path) for place in places), "volumes", volumes, "a file, a folder or several")
    require(isinstance(output_dir, str | Path), "output_dir", output_dir, "a folder")
    channels = pipeline.unet.config.in_channels
    require(channels == 1, "pipeline", f"{channels} channels", "one whose network takes 1 channel")
    side: Any = pipeline.unet.config.sample_size if size is None else size
    check_slicing(side, field_of_view, percentile)
    pipeline._check_images((1, 1, side, side), "size", None)
    threshold = settings.pop("threshold", None)
    call, described = call_settings(settings)
    limit = pipeline.check_inputs(threshold=threshold, **call)
    slicing: dict[str, Any] = {"size": side, "axis": axis, "field_of_view": field_of_view, "percentile": percentile}
    folder = Path(output_dir)
    decisive = {"pipeline": _digest(pipeline), **slicing, "seed": seed, **described, "threshold": limit}
    check_settings(folder, decisive, write=False)
    sources = _sources(places, folder)
    counts = {name: count_slices(open_volume(path), axis) for name, path in sources.items()}
    done = [name for name, path in sources.items() if _finished(folder, name, path)]
    failed = []
    check_settings(folder, decisive)
    with tqdm(desc="detecting", unit="slice", total=sum(counts.values()), initial=sum(counts[n] for n in done)) as bar:
        for name, path in sources.items():
            if name in done:
                continue
            try:
                slices = read_slices(path, **slicing)
            except ValueError as error:  # the others are worth doing
                failed.append(f"{path}: {error}")
                continue
            maps = _maps(pipeline, slices.images, call, batch_size, mix(seed, VOLUMES, zlib.crc32(name.encode())), bar)
            _save(folder, name, slices, maps, limit)
    records = [json.loads(_record(folder, name).read_text()) for name in sources if _record(folder, name).is_file()]
    _write_table(folder / "scores.csv", records)
    if failed:
        raise ValueError(f"`volumes` must be readable, {len(failed)} of {len(sources)} were not: " + " ".join(failed))
    return records


def _sources(places: Sequence[Any], folder: Path) -> dict[str, Path]:
    """Returns the files by the names of their results."""
    found: dict[str, Path] = {}
    results = folder.resolve()
    for place in map(Path, places):
        require(place.exists(), "volumes", str(place), "files or folders that exist")
        inside = [place]
        if place.is_dir():
            inside = sorted(path for path in place.rglob("*") if path.name.endswith(KINDS))
            if place.resolve() in results.parents:  # the results lie within, and are no volumes
                inside = [path for path in inside if results not in path.resolve().parents]
            require(len(inside) > 0, "volumes", str(place), "a folder with files .nii or .nii.gz")
        for path in inside:
            kind = next((kind for kind in KINDS if path.name.endswith(kind)), None)
            require(kind is not None, "volumes", str(path), "files .nii or .nii.gz")
            require(results not in path.resolve().parents, "output_dir", str(folder), "another folder than theirs")
            name = (path.relative_to(place) if place.is_dir() else Path(path.name)).as_posix().removesuffix(str(kind))
            other = found.setdefault(name, path)
            require(other == path, "volumes", str(path), f"of different names, as {str(other)!r} has that one")
    require(len(found) > 0, "volumes", list(places), "at least one file or folder")
    return found


def _digest(pipeline: AnomalyDetectionPipeline) -> str:
    """Returns a few characters that tell networks and schedules apart."""
    scheduler = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    whole = [fingerprint(pipeline.unet), type(pipeline.scheduler).__name__, scheduler, pipeline.config["image_scale"]]
    return f"{zlib.crc32(json.dumps(whole, sort_keys=True, default=str).encode()):08x}"


def _record(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _finished(folder: Path, name: str, path: Path) -> bool:
    record = _record(folder, name)
    return read_json(record) != {} and record.stat().st_mtime >= path.stat().st_mtime


def _maps(pipeline: Any, images: torch.Tensor, call: dict[str, Any], batch_size: int, seed: int, bar: Any) -> Any:
    """Returns the maps of a volume's slices, each with its own random numbers."""
    shown = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(disable=True)
    try:
        found = []
        for rows in torch.arange(len(images)).split(batch_size):
            generators = [torch.Generator().manual_seed(mix(seed, int(i))) for i in rows]
            found.append(pipeline(images[rows], generator=generators, output_type="pt", **call).anomaly_map.cpu())
            bar.update(len(rows))
        return torch.cat(found)
    finally:
        pipeline.set_progress_bar_config(**shown)


def _save(folder: Path, name: str, slices: VolumeSlices, maps: torch.Tensor, limit: float | None) -> None:
    """Writes what was found in a volume, its record last."""
    import nibabel

    restored = slices.restore(maps)
    values = restored.get_fdata(dtype=np.float32)
    made = {"map": restored}
    if limit is not None:
        made["mask"] = nibabel.Nifti1Image((values > limit).astype(np.uint8), restored.affine)
    record = _record(folder, name)
    record.parent.mkdir(parents=True, exist_ok=True)
    for kind, image in made.items():
        path = record.with_name(f"{Path(name).name}_{kind}.nii.gz")
        partial = record.with_name(f".{kind}.{os.getpid()}.tmp.nii.gz")
        nibabel.save(image, partial)
        partial.replace(path)
    scores = maps.amax((1, 2, 3)).tolist()
    millilitres = abs(float(np.linalg.det(restored.affine[:3, :3]))) / 1000
    write_json(
        record,
        {
            "volume": name,
            "score": max(scores),
            "slice_scores": scores,
            "peak": [int(i) for i in np.unravel_index(values.argmax(), values.shape)],
            "mask_ml": None if limit is None else int((values > limit).sum()) * millilitres,
        },
    )


def _write_table(path: Path, records: list[dict[str, Any]]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with partial.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for record in records:
            ml = "" if record["mask_ml"] is None else f"{record['mask_ml']:.6g}"
            row = [record["volume"], f"{record['score']:.6g}", ml, *record["peak"], len(record["slice_scores"])]
            table.writerow(row)
    partial.replace(path)
