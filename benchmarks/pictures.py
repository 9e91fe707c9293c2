"""Makes the pictures of the documentation.

    python -m benchmarks.pictures     # three minutes on a core

The panels of the demo draw those of the methods that they show, each with a JSON file of its figures, which the demo's
test compares with a fresh run. Methods without a panel have the picture of their experiment.
"""

import shutil
import tempfile
from pathlib import Path

from benchmarks.harness import RESULTS
from diffusers_ext.demo import PANELS, run_demo

PICTURES = RESULTS.parents[1] / "docs" / "pictures"
EXPERIMENTS = {
    "domain_studio": "domain_studio/experiment",
    "forward_models_flatland": "forward_models/experiment",
    "forward_models_tasks": "forward_models/tasks",
    "geometry": "geometry/experiment",
    "geometry_images": "geometry/experiment_images",
    "immiscible": "immiscible/digits8_flow",
    "q_diffusion_bits": "q_diffusion/experiment",
    "noise2score_levels": "noise2score/experiment",
    "pnnp_denoisers": "pnnp/denoiser",
    "score_frameworks_samples": "score_frameworks/frameworks",
    "score_frameworks_reconstruction": "score_frameworks/reconstruction",
    "score_frameworks_anomalies": "score_frameworks/anomalies",
    "sgmse_sentence": "sgmse/calls",
}


def main():
    with tempfile.TemporaryDirectory() as folder:
        run_demo(Path(folder))
        for name in PANELS:
            for ending in ("png", "json"):
                shutil.copy(Path(folder) / f"{name}.{ending}", PICTURES)
    for method, result in EXPERIMENTS.items():
        shutil.copy(RESULTS / f"{result}.png", PICTURES / f"{method}.png")
    shutil.copy(RESULTS / "forward_models" / "scene.gif", PICTURES / "forward_models_scene.gif")


if __name__ == "__main__":
    main()
