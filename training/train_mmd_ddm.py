"""Tunes a pretrained image denoiser for a fixed small number of sampling steps with MMD-DDM.

accelerate launch training/train_mmd_ddm.py --pretrained_model_name_or_path MODEL --train_data_dir FOLDER \
    --num_inference_steps 5 --max_train_steps 1000 --output_dir OUT
"""

from diffusers_ext import MMDDDMRecipe, run_training

if __name__ == "__main__":
    run_training(MMDDDMRecipe)
