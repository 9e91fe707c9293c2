"""Loads ImageGenerationPipeline from the package `diffusers-ext`."""

try:
    from diffusers_ext import ImageGenerationPipeline
except ImportError as error:
    raise ImportError("this pipeline needs the package diffusers-ext: pip install diffusers-ext") from error

__all__ = ["ImageGenerationPipeline"]
