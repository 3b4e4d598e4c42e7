"""``python -m pydrone``, which is what torchrun starts."""

import sys

from pydrone.cli import main

if __name__ == "__main__":
    sys.exit(main())
