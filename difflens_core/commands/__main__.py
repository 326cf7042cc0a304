"""python -m difflens_core.commands, where no `difflens` is installed."""

import sys

from .cli import main

sys.exit(main())
