"""Stage two: accelerate launch train_diffusion.py --config configs/tiny.yaml [a.b=c ...]."""

import sys

from hldm.cli import train_diffusion

if __name__ == "__main__":
    sys.exit(train_diffusion())
