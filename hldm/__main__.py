"""`python -m hldm`, the same as `hldm`."""

import sys

from hldm.cli import main

sys.exit(main())
