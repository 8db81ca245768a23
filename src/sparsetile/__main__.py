"""``python -m sparsetile``: the command line."""

import sys

from sparsetile.cli import main

sys.exit(main())
