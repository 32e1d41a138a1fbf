"""`keras-vaultgemma convert`, for a checkout that is not installed: python tools/convert_checkpoint.py --help"""

import sys
from pathlib import Path

from keras_vaultgemma.cli import main

sys.path.insert(0, str(Path(__file__).parents[1]))


if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
