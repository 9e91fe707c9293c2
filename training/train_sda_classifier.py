r"""Fine-tunes an image classifier on aligned synthetic images; the result is an `SDATTAPipeline`.

accelerate launch training/train_sda_classifier.py --classifier CLASSIFIER --train_data_dir ALIGNED \
    --pretrained_model_name_or_path UNCONDITIONAL --output_dir OUT
"""

from diffusers_ext import SDAClassifierRecipe, run_training

if __name__ == "__main__":
    run_training(SDAClassifierRecipe)
