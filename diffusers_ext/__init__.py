"""Diffusion papers as Diffusers components: load with `from_pretrained`, train with accelerate, share on the Hub.

Importing this package is light: names are loaded when they are used. It also makes the package's pipelines known to
`DiffusionPipeline.from_pretrained`.
"""

from __future__ import annotations

import importlib
from typing import Any

from . import _diffusers_hook

__version__ = "0.1.0"

# The public index: where each flat name lives. A method adds its lines here.
_PUBLIC = {
    "data.corruptions": ["corrupt"],
    "data.sampler": ["PositionalBatchSampler", "SeededDataset"],
    "data.sources": ["load_images"],
    "domain_studio.losses": [
        "DomainStudioLoss",
        "haar_high_frequency",
        "pairwise_log_similarity",
        "pairwise_similarity_loss",
    ],
    "domain_studio.recipe": ["DomainStudioConfig", "DomainStudioRecipe"],
    "generation.pipeline": ["ImageGenerationPipeline"],
    "hub.card": ["RepoCard"],
    "hub.repo": ["push_repo", "save_lora_repo", "save_repo"],
    "immiscible.assignment": ["AssignmentNoise", "assignment_permutation"],
    "immiscible.distance": ["distance_cut"],
    "immiscible.nearest": ["NearestNoise", "knn_sample", "knn_select"],
    "immiscible.recipe": ["ImmiscibleConfig", "ImmiscibleRecipe"],
    "immiscible.sign_flip": ["SignFlipNoise"],
    "metrics.diversity": ["intra_cluster_distance"],
    "metrics.features": [
        "ImageClassifierFeatures",
        "clip_features",
        "extract_features",
        "feature_extractor",
        "inception_features",
    ],
    "metrics.frechet": ["GaussianStatistics", "frechet_distance"],
    "metrics.kernel": ["kernel_distance", "mmd2", "polynomial_kernel", "rational_quadratic_kernel", "rbf_kernel"],
    "mmd_ddm.chain": ["differentiable_sample"],
    "mmd_ddm.features": ["FeatureSpace"],
    "mmd_ddm.recipe": ["MMDDDMConfig", "MMDDDMRecipe"],
    "mmd_ddm.replay": ["replayed_loss"],
    "noise_diffusion.base": ["NoiseDiffusionPipelineOutput"],
    "noise_diffusion.diagnostics": ["NoiseDiagnostics", "noise_diagnostics", "plot_noise_diagnostics"],
    "noise_diffusion.inversion": [
        "NoiseLevels",
        "ddim_decode",
        "ddim_invert",
        "expected_inverted_std",
        "noise_levels",
    ],
    "noise_diffusion.mix": [
        "interpolate_embeddings",
        "lerp",
        "noise_diffusion_mix",
        "noise_diffusion_weights",
        "slerp",
    ],
    "noise_diffusion.pipeline": ["NoiseDiffusionPipeline"],
    "noise_diffusion.pipeline_stable_diffusion": ["StableDiffusionNoiseDiffusionPipeline"],
    "noise_diffusion.pipeline_stable_diffusion_xl": ["StableDiffusionXLNoiseDiffusionPipeline"],
    "oms.analysis": ["SignalLeak", "signal_leak", "terminal_snr"],
    "oms.pipeline": ["OMSPipeline"],
    "oms.recipe": ["OMSConfig", "OMSRecipe"],
    "oms.step": ["StartLevel", "oms_step", "start_latents", "start_level"],
    "oms.unet": ["OMSUNet2DConditionModel", "OMSUNet2DModel"],
    "sda.align": ["AlignConfig", "align"],
    "sda.align_set": ["AlignSetConfig", "align_set"],
    "sda.baselines": ["stream_logits", "stream_order"],
    "sda.ensemble": ["ensemble_logits"],
    "sda.evaluate": ["EvaluateConfig", "evaluate"],
    "sda.finetune": ["SDAClassifierConfig", "SDAClassifierRecipe"],
    "sda.generate": ["GenerateConfig", "generate"],
    "sda.lowpass": ["LowPass"],
    "sda.pipeline": ["SDATTAPipeline"],
    "training.arguments": ["parse_config"],
    "training.callbacks": ["Callback"],
    "training.config": ["TrainConfig"],
    "training.denoising": ["DenoisingConfig", "DenoisingRecipe"],
    "training.engine": ["TrainResult", "Trainer"],
    "training.images": ["ImageConfig"],
    "training.noise": ["GaussianNoise", "NoiseStrategy"],
    "training.objectives": ["EpsX0V", "FlowMatching"],
    "training.recipe": ["Modules", "Recipe", "Sample", "StepOutput"],
    "training.rng": ["StepRNG"],
    "training.script": ["run_training"],
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_MODULES)  # noqa: PLE0605 - derived from the index


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    else:
        # Diffusers loads a component of this package only if the base class it knows stands here too.
        value = _diffusers_hook.loadable_base_class(name)
        if value is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


_diffusers_hook.install(_MODULES)
