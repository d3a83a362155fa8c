"""Write on from prompts: python generate.py --run runs/demo --prompt "And the king said"."""

import sys

from hldm.cli import generate

if __name__ == "__main__":
    sys.exit(generate())
