"""`keras-vaultgemma convert` for a checkout that is not installed.

Run `python tools/convert_checkpoint.py --help`.
"""

import sys
from pathlib import Path

# First, because the package is imported from the checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from keras_vaultgemma.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
