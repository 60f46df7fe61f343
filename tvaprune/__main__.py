"""`python -m tvaprune VERB ...`."""

import sys

from tvaprune.cli import main

if __name__ == "__main__":
    sys.exit(main())
