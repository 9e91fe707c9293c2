"""Adapts a pretrained model to about ten images with DomainStudio; with prompts a text-to-image model.

accelerate launch training/train_domain_studio.py --pretrained_model_name_or_path MODEL --train_data_dir FOLDER \
    --resolution 64 --max_train_steps 1000 --output_dir OUT
accelerate launch training/train_domain_studio.py --pretrained_model_name_or_path STABLE_DIFFUSION \
    --train_data_dir FOLDER --instance_prompt "a [V] house" --class_prompt "a house" --class_data_dir CLASS_FOLDER \
    --resolution 512 --train_batch_size 4 --use_lora --max_train_steps 800 --output_dir OUT
"""

from diffusers_ext import DomainStudioRecipe, run_training

if __name__ == "__main__":
    run_training(DomainStudioRecipe)
