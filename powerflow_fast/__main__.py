"""`python -m powerflow_fast`: the command `powerflow-fast`."""

import sys

from powerflow_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
