"""Trains a raw denoiser on clean raw images and the noise of a camera.

accelerate launch training/train_pnnp.py --train_data_dir CLEAN --noise_model runs/noise --num_train_epochs 600
"""

from diffusers_ext import PNNPRecipe, run_training

if __name__ == "__main__":
    run_training(PNNPRecipe)
