"""`python -m hldm.evaluation`, the same as `hldm evaluate`."""

import sys

from hldm.evaluation.evaluate import main

sys.exit(main())
