"""`python -m keras_vaultgemma`: the command line."""

import sys

from keras_vaultgemma.cli import main

if __name__ == "__main__":
    sys.exit(main())
