"""Loads ImageGenerationPipeline from the package `diffusers-ext`."""

# Diffusers runs every local pipeline.py in one module, where the classes of an earlier one would be in the way.
for stale in [name for name, value in globals().items() if isinstance(value, type)]:
    del globals()[stale]

try:
    from diffusers_ext import ImageGenerationPipeline
except ImportError as error:
    raise ImportError("this pipeline needs the package diffusers-ext: pip install diffusers-ext") from error

__all__ = ["ImageGenerationPipeline"]
