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
    "data.assets": ["asset_path"],
    "data.corruptions": ["corrupt"],
    "data.sampler": ["PositionalBatchSampler", "SeededDataset"],
    "data.sources": ["load_images"],
    "methods.ambient.arguments": ["AmbientConfig", "AmbientTextConfig"],
    "methods.ambient.consistency": ["consistency_loss", "reverse_step"],
    "methods.ambient.levels": ["sample_sigma"],
    "methods.ambient.networks": ["SongUNet2DModel"],
    "methods.ambient.noisy_data": ["FrozenNoise"],
    "methods.ambient.objective": [
        "add_noise_to",
        "ambient_prediction",
        "ambient_prediction_vp",
        "unbiased_clean_target",
        "vp_timestep",
    ],
    "methods.ambient.pipeline": ["AmbientPipeline"],
    "methods.ambient.recipe": ["AmbientRecipe"],
    "methods.ambient.sampling": ["edm_levels", "heun_step"],
    "methods.ambient.task": ["AmbientTask"],
    "methods.ambient.text": ["AmbientTextRecipe"],
    "methods.domain_studio.arguments": ["DomainStudioConfig", "DomainStudioTextConfig"],
    "methods.domain_studio.losses": [
        "DomainStudioLoss",
        "haar_high_frequency",
        "pairwise_log_similarity",
        "pairwise_similarity_loss",
    ],
    "methods.domain_studio.recipe": ["DomainStudioRecipe"],
    "methods.domain_studio.text": ["DomainStudioTextRecipe"],
    "methods.forward_models.arguments": ["ForwardModelConfig"],
    "methods.forward_models.blur": ["BlurForwardModel", "DownsampleForwardModel"],
    "methods.forward_models.data": ["ObservationDataset", "SimulatedObservations"],
    "methods.forward_models.denoiser": ["LiftedViews", "lift_views", "lifted_input"],
    "methods.forward_models.generator": ["GeneratorForwardModel"],
    "methods.forward_models.networks": ["ObservationMLP"],
    "methods.forward_models.objective": ["forward_model_loss", "observe"],
    "methods.forward_models.pipeline": ["ForwardModelPipeline", "ForwardModelPipelineOutput"],
    "methods.forward_models.projection": ["ProjectionForwardModel"],
    "methods.forward_models.protocol": ["ForwardModel", "check_differentiable", "map_parameters"],
    "methods.forward_models.recipe": ["ForwardModelRecipe"],
    "methods.forward_models.views": ["CropForwardModel", "MaskForwardModel"],
    "methods.forward_models.volume": ["VolumeForwardModel", "VolumeRendering", "render_cells"],
    "methods.forward_models.warp": ["WarpForwardModel"],
    "generation.denoiser": ["PipelineDenoiser"],
    "generation.prompts": ["Conditions"],
    "generation.score_field": ["ScoreField"],
    "generation.score_levels": ["sigma_of_timestep", "timestep_of_sigma"],
    "generation.pipeline": ["ImageGenerationPipeline"],
    "hub.card": ["RepoCard"],
    "hub.repo": ["push_repo", "save_lora_repo", "save_repo"],
    "methods.geometry.callback": ["SteinResidualCallback"],
    "methods.geometry.dimension": ["LocalDimension", "find_plateau", "local_dimension", "rank_by_dimension"],
    "methods.geometry.flow": ["probability_flow"],
    "methods.geometry.gauge": [
        "Conservativity",
        "GaugeResidual",
        "SteinResidual",
        "conservativity",
        "gauge_residual",
        "gauge_transform",
        "stein_residual",
    ],
    "methods.geometry.inspection": ["InspectConfig", "inspect_model"],
    "methods.geometry.jacobian": ["JacobianProbes", "exact_jacobian", "jacobian_probes"],
    "methods.geometry.likelihood": ["LogLikelihood", "log_likelihood"],
    "methods.geometry.report": ["Inspection"],
    "methods.immiscible.assignment": ["AssignmentNoise", "assignment_permutation"],
    "methods.immiscible.distance": ["distance_cut"],
    "methods.immiscible.nearest": ["NearestNoise", "knn_sample", "knn_select"],
    "methods.immiscible.recipe": ["ImmiscibleConfig", "ImmiscibleRecipe"],
    "methods.immiscible.sign_flip": ["SignFlipNoise"],
    "metrics.detection": ["auroc", "average_precision", "best_dice", "fpr_at_tpr"],
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
    "metrics.speech": ["DNSMOS", "EnergyRatios", "dnsmos", "energy_ratios", "estoi", "pesq_score", "si_sdr"],
    "methods.mmd_ddm.chain": ["differentiable_sample"],
    "methods.mmd_ddm.features": ["FeatureSpace"],
    "methods.mmd_ddm.recipe": ["MMDDDMConfig", "MMDDDMRecipe"],
    "methods.mmd_ddm.replay": ["replayed_loss"],
    "methods.noise_diffusion.base": ["NoiseDiffusionPipelineOutput"],
    "methods.noise_diffusion.diagnostics": ["NoiseDiagnostics", "noise_diagnostics", "plot_noise_diagnostics"],
    "methods.noise_diffusion.any_pipeline": ["PipelineNoiseDiffusion"],
    "methods.noise_diffusion.inversion": ["ddim_decode", "ddim_invert", "expected_inverted_std"],
    "methods.noise_diffusion.levels": ["NoiseLevels", "noise_levels"],
    "methods.noise_diffusion.mix": [
        "interpolate_embeddings",
        "lerp",
        "noise_diffusion_mix",
        "noise_diffusion_weights",
        "slerp",
    ],
    "methods.noise_diffusion.pipeline": ["NoiseDiffusionPipeline"],
    "methods.noise_diffusion.pipeline_stable_diffusion": ["StableDiffusionNoiseDiffusionPipeline"],
    "methods.noise_diffusion.pipeline_stable_diffusion_xl": ["StableDiffusionXLNoiseDiffusionPipeline"],
    "methods.noise2score.ar_dae": ["annealed_smoothing", "ar_dae_loss", "estimate_noise_std"],
    "methods.noise2score.blind": ["NoiseEstimate", "estimate_noise_parameter"],
    "methods.noise2score.diffusion": ["score_from_diffusion"],
    "methods.noise2score.pipeline": ["Noise2ScorePipeline"],
    "methods.noise2score.networks": ["Noise2ScoreConvNet", "Noise2ScoreUNet"],
    "methods.noise2score.noises": [
        "AdditiveGaussianNoise",
        "ExponentialFamilyNoise",
        "ExponentialNoise",
        "GammaNoise",
        "PoissonGaussianNoise",
        "PoissonNoise",
    ],
    "methods.noise2score.recipe": ["Noise2ScoreConfig", "Noise2ScoreRecipe"],
    "methods.noise2score.tweedie": ["posterior_mean"],
    "methods.oms.analysis": ["SignalLeak", "signal_leak", "terminal_snr"],
    "methods.oms.pipeline": ["OMSPipeline"],
    "methods.oms.recipe": ["OMSConfig", "OMSRecipe"],
    "methods.oms.step": ["StartLevel", "oms_step", "start_latents", "start_level"],
    "methods.oms.unet": ["OMSUNet2DConditionModel", "OMSUNet2DModel"],
    "methods.pnnp.bayer": ["pack_bayer", "unpack_bayer"],
    "methods.pnnp.camera": ["CameraProfile", "NativeGain"],
    "methods.pnnp.dark_data": ["noise_divergence"],
    "methods.pnnp.dark_model": ["DarkFrameModel"],
    "methods.pnnp.decouple": ["decouple_dark_frames"],
    "methods.pnnp.develop": ["develop"],
    "methods.pnnp.flats": ["photon_transfer_gain"],
    "methods.pnnp.losses": ["DistributionLoss", "cdf_loss", "quantile_loss"],
    "methods.pnnp.noise_pipeline": ["SensorNoisePipeline"],
    "methods.pnnp.noise_recipe": ["PNNPNoiseConfig", "PNNPNoiseRecipe"],
    "methods.pnnp.pipeline": ["RawDenoisePipeline"],
    "methods.pnnp.proxy": ["SensorNoiseProxy"],
    "methods.pnnp.recipe": ["PNNPConfig", "PNNPRecipe"],
    "methods.pnnp.raw_files": ["RawImage", "read_raw"],
    "methods.pnnp.simulation": ["CameraTruth", "simulate_dark_frames", "simulate_flat_pairs", "simulate_raw"],
    "methods.pnnp.synthesis": ["NoisyRaw", "RawNoiseSynthesizer"],
    "methods.pnnp.unet": ["RawUNet"],
    "methods.q_diffusion.calibration": ["Calibration", "collect_calibration"],
    "methods.q_diffusion.command": ["QDiffusionConfig", "prediction_error", "quantize_pipeline"],
    "methods.q_diffusion.config": ["QDiffConfig"],
    "methods.q_diffusion.convert": ["convert_qdiffusion_checkpoint"],
    "methods.q_diffusion.grids": ["fake_quantize", "quantization_grid"],
    "methods.q_diffusion.kernels": ["select_kernel"],
    "methods.q_diffusion.layers": ["QuantConv2d", "QuantLinear"],
    "methods.q_diffusion.packing": ["pack_int4", "unpack_int4"],
    "methods.q_diffusion.quantizer": ["QDiffQuantizer"],
    "methods.q_diffusion.reconstruct": ["quantize_model"],
    "methods.score_frameworks.conversion": ["NCSNDenoiser", "ncsn_as_denoiser", "score_from_output"],
    "methods.score_frameworks.langevin": ["geometric_sigmas", "langevin_step_size", "largest_distance"],
    "methods.score_frameworks.measurement": ["FourierSampling", "LinearOperator"],
    "methods.score_frameworks.noise": ["SimplexNoise"],
    "methods.score_frameworks.ode": ["solve_probability_flow"],
    "methods.score_frameworks.pipeline_anomaly": ["AnomalyDetectionPipeline"],
    "methods.score_frameworks.pipeline_reconstruction": ["ReconstructionPipeline"],
    "methods.score_frameworks.scheduling_annealed_langevin": ["AnnealedLangevinScheduler"],
    "methods.score_frameworks.scheduling_score_sde": ["ScoreSDEScheduler"],
    "methods.score_frameworks.sde": ["SubVPSDE", "VESDE", "VPSDE"],
    "methods.score_frameworks.timesteps": ["FrameworkTimesteps"],
    "methods.score_frameworks.volume_detection": ["detect_in_volumes"],
    "methods.score_frameworks.volumes": ["VolumeSlices", "read_slices"],
    "methods.sda.align": ["AlignConfig", "align"],
    "methods.sda.align_set": ["AlignSetConfig", "align_set"],
    "methods.sda.baselines": ["stream_logits", "stream_order"],
    "methods.sda.ensemble": ["ensemble_logits"],
    "methods.sda.evaluate": ["EvaluateConfig", "evaluate"],
    "methods.sda.finetune": ["SDAClassifierConfig", "SDAClassifierRecipe"],
    "methods.sda.generate": ["GenerateConfig", "generate"],
    "methods.sda.lowpass": ["LowPass"],
    "methods.sda.pipeline": ["SDATTAPipeline"],
    "methods.sgmse.data": ["MixedSpeech", "PairedSpeech"],
    "methods.sgmse.enhance": ["EnhanceConfig", "enhance_files"],
    "methods.sgmse.pipeline": ["SpeechEnhancementPipeline", "SpeechEnhancementPipelineOutput"],
    "methods.sgmse.recipe": ["SGMSEConfig", "SGMSERecipe"],
    "methods.sgmse.scheduler": ["SpeechSchedulerOutput"],
    "methods.sgmse.scheduler_ouve": ["OUVEScheduler"],
    "methods.sgmse.scheduler_sbve": ["SBVEScheduler"],
    "methods.sgmse.spectrogram": ["Spectrogram"],
    "methods.sgmse.unet": ["SGMSEUNet2DModel"],
    "training.arguments": ["parse_config"],
    "training.callbacks": ["Callback"],
    "training.config": ["TrainConfig"],
    "training.denoising": ["DenoisingConfig", "DenoisingRecipe"],
    "training.engine": ["TrainResult", "Trainer"],
    "training.images": ["ImageConfig"],
    "training.noise": ["GaussianNoise", "NoiseStrategy"],
    "training.objectives": ["EDM", "EpsX0V", "FlowMatching"],
    "training.recipe": ["Modules", "Recipe", "Sample", "StepOutput"],
    "training.text_arguments": ["TextToImageConfig"],
    "training.text_to_image": ["TextToImageRecipe"],
    "rng": ["StepRNG"],
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
