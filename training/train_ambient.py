"""Trains a model of clean images from noisy ones of known level, from scratch or from a pretrained one.

accelerate launch training/train_ambient.py --train_data_dir noisy.npz --sigma_column sigma --resolution 64 \
    --channels 1 --max_train_steps 10000 --output_dir OUT
"""

from diffusers_ext import AmbientRecipe, run_training

if __name__ == "__main__":
    run_training(AmbientRecipe)
