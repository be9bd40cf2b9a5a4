"""The container's entry point, and the clone's: what the installed command ``ichseg`` does."""
# PYTHON_ARGCOMPLETE_OK

import sys

from ichseg.app.main import main

if __name__ == "__main__":
    sys.exit(main())
