"""How near enhanced speech is to the clean one: energy ratios, intelligibility and quality."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import numpy as np

from diffusers_ext.data.audio import resample

__all__ = ["DNSMOS", "EnergyRatios", "dnsmos", "energy_ratios", "estoi", "pesq_score", "si_sdr"]


class EnergyRatios(NamedTuple):
    """Ratios of energies in dB, of one recording.

    Attributes:
        si_sdr: speech to all the rest.
        si_sir: speech to what is left of the noise.
        si_sar: speech to artifacts, what is neither.
    """

    si_sdr: float
    si_sir: float
    si_sar: float


class DNSMOS(NamedTuple):
    """What listeners would say of a recording, by a network, each about 1 to 5, higher is better.

    Attributes:
        overall: of the whole (ITU-T P.835).
        signal: of the speech.
        background: of what is left of the noise.
        p808: of the whole, by a second network (ITU-T P.808).
    """

    overall: float
    signal: float
    background: float
    p808: float


EnergyRatios.__module__ = DNSMOS.__module__ = "diffusers_ext"


def _checked(**waves: Any) -> list[np.ndarray]:
    found = {name: np.asarray(wave, dtype=np.float64) for name, wave in waves.items()}
    shapes = {name: wave.shape for name, wave in found.items()}
    if len(set(shapes.values())) > 1 or next(iter(found.values())).ndim != 1:
        raise ValueError(f"`{'` and `'.join(found)}` must be `(samples,)` of one length, got {list(shapes.values())}.")
    for name, wave in found.items():
        if not np.isfinite(wave).all():
            raise ValueError(f"`{name}` must be finite, got NaN or infinity.")
        if name != "estimate" and not wave.any():
            raise ValueError(f"`{name}` must not be silent, got zeros only.")
    return list(found.values())


def _ratio(signal: np.ndarray, rest: np.ndarray) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(10 * np.log10(np.sum(signal**2) / np.sum(rest**2)))


def si_sdr(estimate: Any, target: Any) -> float:
    """Returns the scale-invariant signal-to-distortion ratio in dB, higher is better (1811.02508, eq. 5).

    Args:
        estimate: `(samples,)` enhanced speech; its gain does not matter.
        target: `(samples,)` clean speech.

    Raises:
        ValueError: lengths differ, or the target is silent.

    Example:
        >>> import numpy as np
        >>> from diffusers_ext import si_sdr
        >>> t = np.arange(8000) / 8000
        >>> speech, noise = np.sin(2 * np.pi * 100 * t), np.sqrt(0.1) * np.sin(2 * np.pi * 300 * t)
        >>> round(si_sdr(0.7 * (speech + noise), speech), 6)
        10.0
    """
    found, clean = _checked(estimate=estimate, target=target)
    part = found @ clean / (clean @ clean) * clean
    return _ratio(part, found - part)


def energy_ratios(estimate: Any, target: Any, noise: Any) -> EnergyRatios:
    """Splits enhanced speech into speech, noise and artifacts, as the authors of SGMSE+ do, and compares energies.

    Args:
        estimate: `(samples,)` enhanced speech.
        target: `(samples,)` clean speech.
        noise: `(samples,)` what was added to it.

    Raises:
        ValueError: lengths differ, or target or noise is silent.
    """
    found, clean, added = _checked(estimate=estimate, target=target, noise=noise)
    part = found @ clean / (clean @ clean) * clean
    left = found @ added / (added @ added) * added
    return EnergyRatios(_ratio(part, found - part), _ratio(part, left), _ratio(part, found - part - left))


def _installed(package: str, extra: str = "speech") -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        hint = ", which needs a C compiler" if package == "pesq" else ""
        name = package.partition(".")[0]
        raise ImportError(
            f"this figure needs the package {name}: pip install 'diffusers-ext[{extra}]'{hint}"
        ) from error


def estoi(estimate: Any, target: Any, sample_rate: int) -> float:
    """Returns the extended short-time objective intelligibility, at most 1, higher is better (by package pystoi).

    Args:
        estimate: `(samples,)` enhanced speech.
        target: `(samples,)` clean speech.
        sample_rate: in Hz.

    Raises:
        ImportError: pystoi is not installed.
        ValueError: lengths differ, or the target is silent.
    """
    found, clean = _checked(estimate=estimate, target=target)
    return float(_installed("pystoi").stoi(clean, found, sample_rate, extended=True))


def pesq_score(estimate: Any, target: Any, sample_rate: int) -> float:
    """Returns PESQ as MOS-LQO, about 1 to 4.6, higher is better (by package pesq).

    At 8 kHz it is the narrow-band score of ITU-T P.862.1, at all other rates the wide-band one of P.862.2 at 16 kHz.

    Args:
        estimate: `(samples,)` enhanced speech.
        target: `(samples,)` clean speech.
        sample_rate: in Hz.

    Raises:
        ImportError: pesq is not installed.
        ValueError: lengths differ, the target is silent, or no speech is found in it.
    """
    found, clean = _checked(estimate=estimate, target=target)
    module, mode = _installed("pesq"), "nb" if sample_rate == 8000 else "wb"
    if mode == "wb":
        found, clean = (resample(wave, sample_rate, 16000) for wave in (found, clean))
        sample_rate = 16000
    try:
        return float(module.pesq(sample_rate, clean, found, mode))
    except module.PesqError as error:
        raise ValueError(f"`target` must hold speech that PESQ finds, got an error: {error}") from error


def dnsmos(wave: Any, sample_rate: int) -> DNSMOS:
    """Returns what listeners would say of a recording, without a clean one to compare with (2110.01763).

    By the networks of package speechmos at 16 kHz, a mean over windows of 9 s; shorter recordings are repeated.

    Args:
        wave: `(samples,)`; what is louder than 1 is clipped.
        sample_rate: in Hz.

    Raises:
        ImportError: speechmos, or what it runs on, is not installed.
        ValueError: the recording is silent or not finite.
    """
    (found,) = _checked(wave=wave)
    module = _installed("speechmos.dnsmos", "dnsmos")
    said = module.run(resample(found, sample_rate, 16000).clip(-1, 1), 16000)
    return DNSMOS(*(float(said[f"{name}_mos"]) for name in ("ovrl", "sig", "bak", "p808")))
