"""Draws the picture of the documentation: a sentence on its way to a noisy recording.

python -m benchmarks.sgmse.picture
"""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from benchmarks.harness import RESULTS
from diffusers_ext import OUVEScheduler, Spectrogram, asset_path
from diffusers_ext.data.audio import read_audio

PICTURE = RESULTS.parents[1] / "docs" / "pictures" / "sgmse.png"
SNR = 5  # dB


def main():
    clean = torch.from_numpy(read_audio(asset_path("speech") / "sentence-1.flac")[0][0])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(clean), generator=generator)
    noisy = clean + noise * clean.std() / noise.std() * 10 ** (-SNR / 20)
    spectrogram, scheduler = Spectrogram(), OUVEScheduler()
    x0, y = (spectrogram.encode(wave / noisy.abs().max())[None, None] for wave in (clean, noisy))
    z = torch.randn(x0.shape, dtype=x0.dtype, generator=generator)
    panels = {"clean speech, t = 0": x0, "noisy recording y": y}
    for t in (0.2, 0.5, 1.0):
        panels[f"t = {t:g}"] = scheduler.add_noise(x0, z, t, y)
    order = ["clean speech, t = 0", "t = 0.2", "t = 0.5", "t = 1", "noisy recording y"]
    figure, axes = plt.subplots(1, 5, figsize=(11, 2.3), sharey=True, constrained_layout=True)
    seconds = len(clean) / spectrogram.sample_rate
    for axis, name in zip(axes, order, strict=True):
        level = 20 * np.log10(panels[name][0, 0].abs().numpy() + 1e-4)
        axis.imshow(level, origin="lower", aspect="auto", vmin=-50, vmax=0, cmap="magma", extent=(0, seconds, 0, 8))
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("seconds", fontsize=8)
        axis.tick_params(labelsize=7)
    axes[0].set_ylabel("kHz", fontsize=8)
    figure.savefig(PICTURE, dpi=80)
    Image.open(PICTURE).convert("RGB").quantize(64).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
