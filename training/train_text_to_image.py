r"""Trains any text-to-image pipeline of Diffusers, or LoRA layers for it, on captioned images.

accelerate launch training/train_text_to_image.py --pretrained_model_name_or_path MODEL --train_data_dir FOLDER \
    --resolution 1024 --lora_rank 16 --mixed_precision bf16 --gradient_checkpointing --cache_latents --cache_prompts \
    --max_train_steps 1000 --output_dir OUT
accelerate launch training/train_text_to_image.py --pretrained_model_name_or_path MODEL --train_data_dir FOLDER \
    --instance_prompt "a photo of sks dog" --class_prompt "a photo of a dog" --class_data_dir CLASS_FOLDER \
    --resolution 512 --lora_rank 8 --max_train_steps 500 --output_dir OUT
"""

from diffusers_ext import TextToImageRecipe, run_training

if __name__ == "__main__":
    run_training(TextToImageRecipe)
