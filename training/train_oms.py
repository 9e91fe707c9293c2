"""Trains a One More Step module for a base pipeline, whose UNet is not even loaded.

accelerate launch training/train_oms.py --pretrained_model_name_or_path BASE --train_data_dir FOLDER --output_dir OUT
"""

from diffusers_ext import OMSRecipe, run_training

if __name__ == "__main__":
    run_training(OMSRecipe)
