"""python -m difflens_core.commands, where no `difflens` is installed."""

import sys

from .starting import main

sys.exit(main())
