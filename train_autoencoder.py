"""Stage one: accelerate launch train_autoencoder.py --config configs/tiny.yaml [a.b=c ...]."""

import sys

from hldm.cli import train_autoencoder

if __name__ == "__main__":
    sys.exit(train_autoencoder())
