"""Trains an image diffusion or flow-matching model with Immiscible Diffusion's noise.

Text-to-image pipelines are trained by train_text_to_image.py, which takes the same noise: --noise assignment or knn.

accelerate launch training/train_immiscible.py --config digits --train_data_dir FOLDER
"""

from diffusers_ext import ImmiscibleRecipe, run_training

if __name__ == "__main__":
    run_training(ImmiscibleRecipe)
