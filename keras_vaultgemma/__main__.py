"""`python -m keras_vaultgemma`: the command line."""

from keras_vaultgemma.cli import main

main()
