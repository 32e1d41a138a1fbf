"""What a run leaves in its folder."""

import json
from pathlib import Path

import pytest

from keras_vaultgemma.recipes.finetune_output import _plain, begin_run

pytestmark = pytest.mark.any_backend


def test_a_run_goes_on_with_the_same_options(tmp_path):
    folder = tmp_path / "run"
    options = {"preset": Path("a/b"), "lora_rank": 8, "epochs": 1, "data": "a.txt"}
    begin_run(folder, {**options, "lora_rank": 4})
    begin_run(folder, options)  # No step was done.
    assert json.loads((folder / "run.json").read_text()) == {
        "options": {**options, "preset": "a/b"}
    }
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "training.state").touch()
    begin_run(folder, {**options, "epochs": 3, "data": "b.txt"})
    with pytest.raises(
        ValueError,
        match="run with lora_rank=8. Received: lora_rank=4. Give this run another `output`",
    ):
        begin_run(folder, {**options, "lora_rank": 4})


@pytest.mark.parametrize("content", ["", "[]", "{}", "3", '{"options": [1]}'])
def test_a_damaged_record(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "training.state").touch()
    with pytest.raises(
        ValueError, match=r"run\.json is missing or damaged .*Give this run another `output`"
    ):
        begin_run(tmp_path, {"lora_rank": 8})


def test_numbers_that_are_not_finite_are_null():
    assert _plain({"a": [1.5, float("nan")], "b": (float("inf"), "x", None)}) == {
        "a": [1.5, None],
        "b": [None, "x", None],
    }
