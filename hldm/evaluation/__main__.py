"""`python -m hldm.evaluation`, the same as `hldm evaluate`."""

import sys

from hldm.cli import evaluate

if __name__ == "__main__":
    sys.exit(evaluate())
