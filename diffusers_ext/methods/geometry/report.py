"""What an inspection found: a table, a picture and JSON."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .dimension import find_plateau
from .gauge import GaugeResidual, SteinResidual, ratio_error

__all__ = ["Inspection", "summary"]


@dataclass(frozen=True)
class Inspection:
    """What an inspection found.

    Attributes:
        figures: all of it, plain types: means by noise level with standard errors over images, and every image's own
            curve, plateau and likelihood.
        table: the same in lines for people.
    """

    figures: dict[str, Any]
    table: str

    def __str__(self) -> str:
        return self.table

    def save(self, folder: Path) -> None:
        """Writes `inspection.json`, `inspection.txt` and, where matplotlib is installed, `inspection.png`."""
        (folder / "inspection.json").write_text(json.dumps(self.figures, indent=1) + "\n")
        (folder / "inspection.txt").write_text(self.table + "\n")
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        curves = {k: v for k, v in self.figures["dimension"].items() if len(v["sigmas"]) > 1}
        if not curves:
            return
        figure = Figure(figsize=(9, 3.4), constrained_layout=True)
        left, right = figure.subplots(1, 2)
        for name, entry in curves.items():
            left.semilogx(entry["sigmas"], entry["mean"], "o-" if len(entry["sigmas"]) < 5 else "-", label=name)
            if entry["plateau"] is not None:
                left.plot(entry["plateau"]["sigma"], entry["plateau"]["value"], "k*")
        left.set(xlabel="noise level sigma", ylabel="local dimension, mean over images")
        left.legend(fontsize=8)
        if "stein" in self.figures:
            stein = self.figures["stein"]
            right.errorbar(stein["sigmas"], stein["ratio"], stein["ratio_error"], capsize=2)
            right.axhspan(-0.1, 0.1, color="0.9")
            right.set(xscale="log", xlabel="noise level sigma", ylabel="Stein residual / loss", ylim=(-1, 1))
        figure.savefig(folder / "inspection.png", dpi=90)


def summary(records: list[dict[str, Any]], sigmas: list[float], dim: int) -> Inspection:
    """Joins the records of images."""
    of = torch.tensor(sigmas, dtype=torch.float64)
    figures: dict[str, Any] = {"images": len(records), "values_an_image": dim, "dimension": {}}
    lines = [f"{len(records)} images of {dim} values"]
    masked = None
    if "dsm" in records[0]:
        curves, residuals = (torch.tensor([r[key] for r in records], dtype=torch.float64) for key in ("dsm", "stein"))
        stein = SteinResidual.of_draws(sigmas, residuals, curves)
        masked = stein.masked
        ratio, error = stein.value / stein.denoising_error, stein.standard_error / stein.denoising_error
        figures["stein"] = {
            "sigmas": sigmas,
            "residual": stein.value.tolist(),
            "standard_error": stein.standard_error.tolist(),
            "ratio": ratio.tolist(),
            "ratio_error": error.tolist(),
            "no_score": masked.tolist(),
        }
        slopes = torch.tensor([r["slope_error"] for r in records], dtype=torch.float64)
        _dimension(figures, lines, "dsm", of, curves, dim, masked, slopes)
        lines.append("   sigma    dimension (dsm)   Stein residual / loss")
        for k, sigma in enumerate(sigmas):
            note = "  no score" if bool(masked[k]) else ""
            lines.append(f"{sigma:8.4g} {stein.denoising_error[k]:12.2f} {ratio[k]:16.3f} +- {error[k]:.3f}{note}")
    for name in ("trace", "flipd", "normal_bundle", "lidl", "flow_map"):
        if name in records[0]:
            at = torch.tensor(records[0][name]["sigmas"], dtype=torch.float64)
            curves = torch.tensor([r[name]["curve"] for r in records], dtype=torch.float64)
            own = masked if masked is not None and len(at) == len(sigmas) else None
            _dimension(figures, lines, name, at, curves, dim, own)
            pairs = (f"{value:.1f} at {sigma:.3g}" for sigma, value in zip(at, curves.mean(0), strict=True))
            lines += textwrap.wrap(f"{name} by sigma: {', '.join(pairs)}", 100, subsequent_indent="  ")
    if "gauge" in records[0]:
        at = records[0]["gauge"]["sigmas"]
        values, norms = (
            torch.tensor([r["gauge"][key] for r in records], dtype=torch.float64) for key in ("values", "norms")
        )
        found = GaugeResidual.of_terms(at, values, norms)
        largest = found.z.abs().max(1)
        figures["gauge"] = {
            "sigmas": at,
            "names": found.names,
            "relative": found.relative.tolist(),
            "standard_error": (found.standard_error / found.scale).tolist(),
        }
        for k, sigma in enumerate(at):
            which = found.names[int(largest.indices[k])]
            lines.append(
                f"weak gauge residual at sigma {sigma:.3g}: {found.relative[k, 0]:.3f} along |x|^2/2, at most "
                f"{largest.values[k]:.1f} standard errors ({which})"
            )
    if "asymmetry" in records[0]:
        at = records[0]["asymmetry"]["sigmas"]
        parts = torch.tensor([r["asymmetry"]["parts"] for r in records], dtype=torch.float64)
        ratio, error = parts[..., 0].mean(0) / parts[..., 1].mean(0), ratio_error(parts[..., 0], parts[..., 1])
        figures["asymmetry"] = {"sigmas": at, "value": ratio.tolist(), "standard_error": error.tolist()}
        for sigma, value, e in zip(at, ratio, error, strict=True):
            lines.append(f"asymmetry of the denoiser's Jacobian at sigma {sigma:.3g}: {value:.4f} +- {e:.4f}")
    if "likelihood" in records[0]:
        figures["likelihood"] = [r["likelihood"] for r in records]
        nats, bits = (
            torch.tensor([entry[key] for entry in figures["likelihood"]]) for key in ("nats", "bits_per_dim")
        )
        lines.append(
            f"log-likelihood at sigma {figures['likelihood'][0]['sigma_min']:.3g}: {nats.mean():.2f} nats, "
            f"{bits.mean():.3f} bits a value"
        )
    return Inspection(figures, "\n".join(lines))


def _dimension(
    figures: dict[str, Any],
    lines: list[str],
    name: str,
    sigmas: torch.Tensor,
    curves: torch.Tensor,
    dim: int,
    masked: torch.Tensor | None,
    slope_errors: torch.Tensor | None = None,
) -> None:
    errors = [None] * len(curves) if slope_errors is None else slope_errors
    mean = curves.mean(0)
    own = [find_plateau(sigmas, curve, dim, masked, more) for curve, more in zip(curves, errors, strict=True)]
    flat = find_plateau(sigmas, mean, dim, masked)
    figures["dimension"][name] = {
        "sigmas": sigmas.tolist(),
        "mean": mean.tolist(),
        "standard_error": (curves.std(0) / len(curves) ** 0.5).tolist(),
        "plateau": None if flat is None else {"sigma": flat[0], "value": flat[1]},
        "images": curves.tolist(),
        "plateaus": [None if f is None else {"sigma": f[0], "value": f[1]} for f in own],
    }
    said = "none: the curve is the answer" if flat is None else f"{flat[1]:.2f} at sigma {flat[0]:.3g}"
    count = sum(f is not None for f in own)
    lines.append(f"plateau of {name}: {said} ({count} of {len(own)} images have one)")
