"""``python -m bdexport``: the same as the command ``bdexport``."""

from __future__ import annotations

import sys

from bdexport.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
