"""Trains an image diffusion or flow-matching model with Immiscible Diffusion's noise.

accelerate launch training/train_immiscible.py --config training/configs/digits.yaml --train_data_dir FOLDER
"""

from diffusers_ext import ImmiscibleConfig, ImmiscibleRecipe, Trainer, parse_config


def main() -> None:
    """Parses the arguments and trains."""
    config = parse_config(ImmiscibleConfig)
    Trainer(config, ImmiscibleRecipe(config)).train()


if __name__ == "__main__":
    main()
