"""`python -m powerflow_fast.cli`, as accelerate starts it on every rank."""

import sys

from powerflow_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
