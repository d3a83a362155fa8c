"""`python -m hldm.jepa`, the same as `hldm jepa`."""

import sys

from hldm.cli import jepa

sys.exit(jepa())
