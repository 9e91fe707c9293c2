"""The images and the classifier that ship with the package; `assets/digits/README.md` says where they come from."""

from .assets import ASSETS

__all__ = ["CLASSIFIER", "DIGITS", "TEXT_TO_IMAGE"]

DIGITS = ASSETS / "digits" / "digits.npz"
"""1,000 handwritten digits, 28x28, 100 of each class: held out from all training of shipped models."""
CLASSIFIER = ASSETS / "digits-classifier"
"""An `ImageClassifierFeatures` trained on 4,000 other digits."""
TEXT_TO_IMAGE = ASSETS / "digits-text"
"""A stock `StableDiffusion3Pipeline` that draws digits from prompts such as "a handwritten three"."""
