"""Trains SGMSE+ speech enhancement.

accelerate launch training/train_sgmse.py --train_data_dir FOLDER --output_dir runs/speech
"""

from diffusers_ext import SGMSERecipe, run_training

if __name__ == "__main__":
    run_training(SGMSERecipe)
