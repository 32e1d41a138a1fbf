"""`keras-vaultgemma convert`, for a checkout that is not installed: python tools/convert_checkpoint.py --help"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from keras_vaultgemma import cli

if __name__ == "__main__":
    sys.exit(cli.main(["convert", *sys.argv[1:]]))
