"""``python -m pykata_cli``."""

import sys

from pykata_cli.cli import main

sys.exit(main())
