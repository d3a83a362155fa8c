"""`python -m hldm.evaluation`, the same as `hldm evaluate`."""

import sys

from hldm.cli import evaluate

sys.exit(evaluate())
