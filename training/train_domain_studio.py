"""Adapts a pretrained image model to about ten images with DomainStudio.

accelerate launch training/train_domain_studio.py --pretrained_model_name_or_path MODEL --train_data_dir FOLDER \
    --resolution 64 --max_train_steps 1000 --output_dir OUT
"""

from diffusers_ext import DomainStudioRecipe, run_training

if __name__ == "__main__":
    run_training(DomainStudioRecipe)
