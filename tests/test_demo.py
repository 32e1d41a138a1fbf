import re

import pytest
from demo import ARGUMENTS

from keras_vaultgemma.cli import main


@pytest.mark.any_backend
def test_the_text_does_not_go_in_circles(capsys):
    """No three words stand in it twice."""
    assert main(ARGUMENTS) == 0
    words = re.findall(r"\w+", capsys.readouterr().out.lower())
    runs = list(zip(words, words[1:], words[2:], strict=False))
    assert len(runs) > 35 and len({*runs}) == len(runs)
