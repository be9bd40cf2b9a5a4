"""The container's entry point, and the clone's: what the installed command ``ichseg`` does."""

import sys

from ichseg.app.main import main

if __name__ == "__main__":
    sys.exit(main())
