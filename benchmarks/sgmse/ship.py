"""Makes the speech enhancer that ships with the package, out of the experiment's seed 0.

    python -m benchmarks.sgmse.experiment --seeds 0     # trains it, see there
    python -m benchmarks.sgmse.ship --packages runs/sgmse/packages     # two minutes on one core

Weights of layers are kept as 8-bit floats, which `from_pretrained` loads as what it is asked for; the card holds the
figures of what ships.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.harness import RESULTS, made_portable
from benchmarks.sgmse.experiment import MEASURES, measured, way
from benchmarks.sgmse.sets import make_test_sets, packages_folder
from diffusers_ext import RepoCard, SpeechEnhancementPipeline, save_repo

ROOT = RESULTS.parents[1]
FOLDER = ROOT / "diffusers_ext" / "assets" / "speech-enhancement"
SNIPPET = """import diffusers_ext  # pip install 'diffusers-ext[speech]'
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{repo_id}")
result = pipeline("noisy.wav", num_inference_steps=5)
print(result.audios[0].shape, result.sample_rate)"""


def write(pipeline, card=None):
    """Saves the pipeline, weights of layers in 8 bits; biases, norms and frequencies stay as they are."""
    save_repo(pipeline, FOLDER, card=card)
    path = FOLDER / "unet" / "diffusion_pytorch_model.safetensors"
    weights = {name: w.to(torch.float8_e4m3fn) if w.ndim > 1 else w for name, w in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", default="runs/sgmse/packages")
    parser.add_argument("--source", type=Path, default=Path("runs/sgmse/experiment/seed-0"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    write(SpeechEnhancementPipeline.from_pretrained(arguments.source))
    shipped, results = SpeechEnhancementPipeline.from_pretrained(FOLDER), {}
    names = {"noise": "held-out prompts with noise", "music": "with music", "unseen": "unseen speakers with noise"}
    for name, pairs in make_test_sets(packages_folder(arguments.packages), 12).items():
        for title, enhance in {"noisy": lambda waves: waves, "enhanced": way(shipped, 0, 5)}.items():
            for measure, value in measured(enhance, pairs).items():
                results[f"{names[name]}: {MEASURES[measure]}, {title}"] = value
    trained = json.loads((arguments.source / "training_arguments.json").read_text())
    trained = {key: Path(value).name if key.endswith("_dir") and value else value for key, value in trained.items()}
    card = RepoCard(
        method="Speech enhancement",
        description="Takes noise from speech at 8 kHz in 5 calls of a network of 1.1 million weights, by SGMSE+ with "
        "transitions. It is small, and has heard three voices: a demonstration of the parts, not a product.",
        data="Prompts of Asterisk in English, French and Italian (Debian packages asterisk-core-sounds-en-wav, "
        "-fr-wav and -it-wav, CC BY-SA 3.0), with computed noise and music of asterisk-moh-opsound-wav.",
        license="cc-by-sa-3.0",
        tags=["diffusers-ext", "speech-enhancement", "audio-to-audio"],
        paper="https://arxiv.org/abs/2208.05830",
        snippet=SNIPPET.replace("{repo_id}", "diffusers_ext/assets/speech-enhancement"),
        arguments={"command": "python -m benchmarks.sgmse.ship", **trained},
        results=results,
        pipeline_tag="audio-to-audio",
    )
    write(shipped, card)
    print(f"{FOLDER}: {made_portable(FOLDER):.2f} MiB", results)


if __name__ == "__main__":
    main()
