"""Trains the score of noisy images from them alone, for denoising in one network call.

accelerate launch training/train_noise2score.py --train_data_dir NOISY_IMAGES --noise gaussian --channels 1
"""

from diffusers_ext import Noise2ScoreRecipe, run_training

if __name__ == "__main__":
    run_training(Noise2ScoreRecipe)
