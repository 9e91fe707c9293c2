"""Quantizes a pipeline's network to 4 or 8 bits with Q-Diffusion: sample, calibrate, quantize, measure, save, push.

python training/quantize_qdiff.py --pretrained_model_name_or_path MODEL --weight_bits 4 --act_bits 8 --output_dir OUT
"""

import sys

from diffusers_ext.train import main

if __name__ == "__main__":
    main(["q_diffusion", *sys.argv[1:]], "python training/quantize_qdiff.py")
