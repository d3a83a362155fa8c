"""`python -m hldm`, the same as `hldm`."""

import sys

from hldm.cli import main

if __name__ == "__main__":
    sys.exit(main())
