"""`python -m xplus_fast`: the same as `xplus-fast`."""

import sys

from xplus_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
