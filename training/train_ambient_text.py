"""Trains any text-to-image pipeline of Diffusers, or LoRA layers for it, on images that are noised against memorising.

accelerate launch training/train_ambient_text.py --pretrained_model_name_or_path MODEL --train_data_dir FOLDER \
    --sigma 0.344 --resolution 1024 --lora_rank 16 --max_train_steps 1000 --output_dir OUT
"""

from diffusers_ext import AmbientTextRecipe, run_training

if __name__ == "__main__":
    run_training(AmbientTextRecipe)
