"""Trains a diffusion model of signals of which only partial observations are known, through their forward model.

accelerate launch training/train_forward_model.py --train_data_dir VIEWS.npz --forward_model DIR --signal_shape 1,8,8
"""

from diffusers_ext import ForwardModelRecipe, run_training

if __name__ == "__main__":
    run_training(ForwardModelRecipe)
