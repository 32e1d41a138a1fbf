"""The ledger: what is written can be read, runs on the same data compose, invalid lines are errors."""

import json

import pytest
from ledger_cases import DATA, OTHER_DATA, OTHER_KEY, a_run, counts, release_steps

from keras_vaultgemma.checkpoints import presets
from keras_vaultgemma.privacy import accounting
from keras_vaultgemma.privacy.ledger import (
    FILE,
    Ledger,
    combine_ledgers,
    parse_ledger,
    preset_ledger,
    read_ledger,
)
from keras_vaultgemma.privacy.ledger_writer import OpenRun
from keras_vaultgemma.privacy.statements import plain_training

pytestmark = pytest.mark.any_backend


def test_what_is_written_can_be_read(tmp_path):
    path = tmp_path / "run" / FILE
    with OpenRun(path, a_run()) as run:
        for _ in range(50):
            run.release()
    ((found, count),) = read_ledger(path).runs
    assert count == 50 and found == run.run and found._replace(name="") == a_run()
    assert found.steps(count) == accounting.Steps(50, 1000, 0.05, 80, 1.0)
    assert (found.mechanism, found.neighbouring) == (
        "DP-SGD with truncated Poisson sampling",
        "zero-out",
    )
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == [
        "run",
        *["steps"] * 50,
        "end",
    ]


def test_runs_on_the_same_data_compose_and_others_are_separate(tmp_path):
    path = tmp_path / FILE
    runs = [
        a_run(),
        a_run(delta=1e-6, noise_multiplier=2.0, unit="one row"),
        a_run(dataset=OTHER_DATA),
    ]
    for run in runs:
        with OpenRun(path, run) as opened:
            release_steps(path, opened, 20, [])
    spent = read_ledger(path).spent()
    assert list(spent) == [DATA, OTHER_DATA]
    both = [run.steps(20) for run in runs[:2]]
    assert spent[DATA] == accounting.spent(both, 1e-6, "one row of at most 256 tokens; one row")
    assert spent[DATA].steps == 40
    assert spent[OTHER_DATA] == accounting.spent(
        [runs[2].steps(20)], 1e-5, "one row of at most 256 tokens"
    )
    assert read_ledger(path).spent(1e-3)[OTHER_DATA].epsilon < spent[OTHER_DATA].epsilon
    assert read_ledger(path).on(DATA) == both


def test_a_seeded_run_voids_the_guarantee_of_all_runs_on_its_data():
    seeded = f"{accounting.SEEDED}: {accounting.MECHANISM}"
    runs = (
        (a_run(name="1"), 2),
        (a_run(name="2", mechanism=seeded), 2),
        (a_run(name="3", dataset=OTHER_DATA), 2),
    )
    spent = Ledger(runs=runs).spent()
    assert (
        spent[DATA].mechanism == f"{accounting.MECHANISM}; {seeded}" and not spent[DATA].is_private
    )
    assert spent[OTHER_DATA].mechanism == accounting.MECHANISM and spent[OTHER_DATA].is_private
    written = parse_ledger(Ledger(runs=runs).lines(), "a file")
    assert written.describe()[1].startswith("2 steps of NOT private, seeded for tests: DP-SGD")
    assert written.spent() == spent


def test_data_under_different_keys_counts_as_the_same():
    runs = ((a_run(name="1"), 20), (a_run(name="2", dataset=OTHER_KEY), 10))
    spent = Ledger(runs=runs).spent()
    assert spent[DATA] == spent[OTHER_KEY] and spent[DATA].steps == 30


def test_pre_training_is_the_first_entry(tmp_path):
    """VaultGemma's guarantee is read from the preset's metadata.json and written before the run that uses it."""
    history = preset_ledger(presets.bundled()["vaultgemma_1b"])
    ((statement,), runs) = history
    assert (statement["epsilon"], statement["delta"], runs) == (2.0, 1.1e-10, ())
    path = tmp_path / FILE
    for _ in range(2):
        with OpenRun(path, a_run(), history) as run:
            run.release()
    found = read_ledger(path)
    assert found.statements == (statement,) and counts(path) == [1, 1]
    assert json.loads(path.read_text().splitlines()[0]) == {"kind": "statement", **statement}


def test_training_without_privacy(tmp_path):
    """Each call of `fit` counts, and unknown statements of other people's metadata.json are ignored."""
    plain = tuple(plain_training(steps) for steps in (5, 5, 1000))
    strange = (
        "private",
        {"training": "without privacy"},
        {"training": "without privacy", "steps": "5"},
    )
    assert (
        Ledger((*strange, *plain)).without_privacy()
        == "1,010 steps, whose records no guarantee covers"
    )
    assert Ledger(strange).without_privacy() == ""
    Ledger(plain).write(tmp_path)
    assert combine_ledgers(preset_ledger(tmp_path), Ledger(plain)) == Ledger(plain)


def test_a_preset_without_a_statement_has_an_empty_ledger(tmp_path):
    assert preset_ledger(presets.bundled()["vaultgemma_tiny"]) == Ledger()
    assert preset_ledger(tmp_path) == Ledger()


def test_a_saved_preset_has_the_ledger_of_its_weights(tmp_path):
    """It is saved during a run, with all steps of its weights; a new run from the preset begins with its entries."""
    path, saved = tmp_path / "one" / FILE, tmp_path / "saved" / FILE
    history = preset_ledger(presets.bundled()["vaultgemma_1b"])
    run = OpenRun(path, a_run(), history)
    release_steps(path, run, 30, [])
    saved.parent.mkdir()
    saved.write_bytes(read_ledger(path).lines())
    release_steps(path, run, 10, [])
    assert read_ledger(saved) == preset_ledger(saved.parent)
    assert (read_ledger(saved).statements, counts(saved), counts(path)) == (
        history.statements,
        [30],
        [40],
    )
    new = tmp_path / "new" / FILE
    with OpenRun(new, a_run(dataset=OTHER_DATA), read_ledger(saved)) as second:
        second.release()
    assert read_ledger(new).statements == history.statements
    assert [(run.name, count) for run, count in read_ledger(new).runs] == [
        (run.run.name, 30),
        (second.run.name, 1),
    ]


RUN = json.dumps({"kind": "run", **a_run(name="1")._asdict()})


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"kind": "steps", "run": "2", "steps": 3}', "unknown run or missing '2'"),
        ('{"kind": "end", "run": "2", "steps": 3}', "unknown run or missing '2'"),
        (
            '{"kind": "steps", "run": "1", "steps": -3}',
            "`steps` must be an integer of at least 0. Received: steps=-3",
        ),
        (
            '{"kind": "end", "run": "1", "steps": true}',
            "`steps` must be an integer of at least 0. Received: steps=True",
        ),
        ('{"kind": "steps", "run": ["1"], "steps": 3}', "unhashable type: 'list'"),
        ('{"kind": "gift"}', "unknown kind 'gift'"),
        ('{"steps": 3}', "missing 'kind'"),
        ('{"kind": "run", "rows": 3}', "missing"),
        (RUN, "a second run has the name '1'"),
        (RUN.replace('"name": "1"', '"name": 1'), "`name` must be a string. Received: name=1"),
        (
            RUN.replace(f'"{accounting.MECHANISM}"', "1").replace('"name": "1"', '"name": "2"'),
            "`mechanism` must be a string",
        ),
        (RUN.replace("0.05", "5"), "`sampling_probability` must be a number above 0 and at most 1"),
        (
            RUN.replace("0.05", '"5"'),
            "`sampling_probability` must be a number above 0 and at most 1. Received: sampling_probability='5'",
        ),
    ],
)
def test_an_invalid_complete_line_is_an_error(line, message):
    """It was changed or written by a newer version. Skipping it might under-count steps."""
    with pytest.raises(ValueError) as error:
        parse_ledger(f"{RUN}\n{line}\n".encode(), "a/file")
    assert str(error.value).startswith("a/file, line 2 is not an entry of a privacy ledger: ")
    assert message in str(error.value)
