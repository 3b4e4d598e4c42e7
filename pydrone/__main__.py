"""``python -m pydrone``, which is what torchrun starts."""

import sys

from pydrone.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
