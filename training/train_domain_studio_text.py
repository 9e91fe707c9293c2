"""Adapts any text-to-image pipeline of Diffusers to about ten images with DomainStudio, whole or by LoRA.

accelerate launch training/train_domain_studio_text.py --pretrained_model_name_or_path MODEL --train_data_dir FOLDER \
    --instance_prompt "a [V] house" --class_prompt "a house" --class_data_dir CLASS_FOLDER \
    --resolution 512 --train_batch_size 4 --lora_rank 8 --max_train_steps 800 --output_dir OUT
"""

from diffusers_ext import DomainStudioTextRecipe, run_training

if __name__ == "__main__":
    run_training(DomainStudioTextRecipe)
