"""Diffusion papers as Diffusers components."""

__version__ = "0.1.0"
