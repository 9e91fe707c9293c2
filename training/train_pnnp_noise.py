"""Learns a camera's noise from frames with the cap on.

accelerate launch training/train_pnnp_noise.py --dark_frames_dir DARKS --camera sony_a7s2 --max_train_steps 1000
"""

from diffusers_ext import PNNPNoiseRecipe, run_training

if __name__ == "__main__":
    run_training(PNNPNoiseRecipe)
