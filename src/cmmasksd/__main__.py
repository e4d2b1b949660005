"""`python -m cmmasksd` is the command line."""

import sys

from cmmasksd.cli import main

sys.exit(main())
