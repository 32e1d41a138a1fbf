"""The ledger of this machine: runs of other models on the same records."""

import json
import shutil

import keras
import numpy as np
import pytest
from common import LINES
from ledger_cases import DATA, OTHER_DATA, OTHER_KEY, a_run
from privacy_cases import ROWS, fit, language_model, some_rows, tiny_model

from keras_vaultgemma import cli, privacy
from keras_vaultgemma.privacy import accounting, fingerprint, machine_ledger
from keras_vaultgemma.privacy.ledger import FILE
from keras_vaultgemma.privacy.ledger_writer import OpenRun

pytestmark = pytest.mark.any_backend


def sketch(*records):
    found = fingerprint.RowSketch(b"k" * 32)
    assert list(found.watch(records)) == list(records)
    return found.values()


ONE = sketch("one")


def composed(*counts, delta=1e-5, **changes):
    return accounting.epsilon([a_run(**changes).steps(count) for count in counts], delta)


def test_a_run_is_recorded_beside_the_key_of_the_fingerprints(tmp_path):
    path = tmp_path / "model" / FILE
    with OpenRun(path, a_run(), rows=ONE) as run:
        for _ in range(3):
            run.release()
    (found,) = machine_ledger.read_runs()
    assert (found.run, found.steps, found.ledger) == (run.run, 3, str(path))
    np.testing.assert_array_equal(found.rows, ONE)
    assert found.folder == tmp_path / "home" / "private_runs" / run.run.name
    assert found.folder.stat().st_mode & 0o077 == 0
    # Nothing about single records lies beside the model.
    assert [file.name for file in path.parent.iterdir()] == [FILE]


def test_an_interrupted_run_counts_all_steps_that_it_may_have_released():
    run = OpenRun(None, a_run(planned_steps=500), rows=ONE)
    for _ in range(7):
        run.release()
    (found,) = machine_ledger.read_runs()
    assert found.steps == 500  # It is running, and will release all of them.
    run._close_files()  # as when its process is killed
    (found,) = machine_ledger.read_runs()
    assert 7 <= found.steps <= 7 + 2 * run.run.block
    shutil.rmtree(found.folder)
    assert machine_ledger.read_runs() == []


@pytest.mark.parametrize("name", [FILE, "about.json"])
def test_a_damaged_run_is_named(name):
    OpenRun(None, a_run(), rows=ONE).close()
    (found,) = machine_ledger.read_runs()
    (found.folder / name).write_text('{"kind": "end", "run": "?"}\n' if name == FILE else "[")
    with pytest.raises(ValueError, match=name):
        machine_ledger.read_runs()


def test_records_in_common():
    """Spaces, case and punctuation make no other record of a text."""
    texts = ["A cold, since Monday.", "Ein Fußbad hilft.", "体温 38.5", "..."]
    variants = ["a cold since\nmonday ", "EIN FUSSBAD HILFT", "体温 38 5", "... "]
    assert fingerprint.rows_in_common(sketch(*texts), sketch(*variants)) == 3
    assert fingerprint.rows_in_common(sketch(*texts), sketch(*texts[1:], "A cold")) == 3
    assert fingerprint.rows_in_common(sketch(b"one", b"two"), sketch(b"two", "one")) == 1
    assert len(sketch(*texts, *texts)) == 4


def test_a_sketch_of_many_records_is_a_sample_that_finds_records_in_common(monkeypatch):
    monkeypatch.setattr(fingerprint, "SKETCH_SIZE", 100)
    one, other = (sketch(*map(str, range(start, start + 1000))) for start in (0, 500))
    assert len(one) == 100
    assert 25 <= fingerprint.rows_in_common(one, other) <= 75


def test_runs_under_another_key_may_be_on_the_same_data():
    for dataset in (DATA, OTHER_DATA, OTHER_KEY):
        OpenRun(None, a_run(dataset=dataset), rows=ONE).close()
    runs = machine_ledger.read_runs()
    assert [one.run.dataset for one, _ in machine_ledger.in_common(ONE, DATA, runs)] == [
        DATA,
        OTHER_DATA,
    ]
    assert len(machine_ledger.as_ledger(runs).on(DATA)) == 2


def test_equal_runs_compose_as_one():
    runs = [(a_run(name="a"), 3), (a_run(name="b", noise_multiplier=2.0), 4), (a_run(name="c"), 5)]
    ledger = machine_ledger.as_ledger([machine_ledger.MachineRun(*run, "", "", "") for run in runs])
    assert [steps.count for steps in machine_ledger.steps_of(ledger)] == [8, 4]


def trained(rows, **settings):
    model = tiny_model(**{"epsilon": 3.0, "noise_multiplier": None, **settings})
    model.fit(rows, batch_size=2, verbose=0)
    return model.privacy


@pytest.mark.filterwarnings("ignore:.*rows were longer")
def test_one_changed_row_is_no_new_budget(capsys):
    """Models on almost the same rows: `spent` reports 3 for each of them, and what they compose to."""
    rows = [*LINES, *(line[::-1] for line in LINES)]
    spent = [trained(rows).spent()]
    assert (spent[0].epsilon_of_all_runs, spent[0].all_runs) == (spent[0].epsilon, 1)
    for changed, shared in ((rows[:-1], 7), ([*rows, "one"], 8), ([row + " " for row in rows], 8)):
        with pytest.warns(UserWarning, match=f"had records of these data: {shared} records in"):
            record = trained(changed)
        spent.append(record.spent())
        assert 2.99 < spent[-1].epsilon <= 3.0
    assert [one.all_runs for one in spent] == [1, 2, 3, 4]
    runs = machine_ledger.as_ledger(machine_ledger.read_runs())
    expected = accounting.epsilon([run.steps(count) for run, count in runs.runs], 1e-4)
    assert spent[-1].epsilon_of_all_runs == pytest.approx(expected, rel=1e-3) and expected > 5
    # The model's own ledger, which goes with it, knows its own run alone.
    assert len(record.ledger.runs) == 1

    assert cli.main(["ledger"]) == 0
    text = capsys.readouterr().out
    assert "4 private runs on this machine" in text
    assert (
        "Data A: ε = 3 at δ = 0.0001 for one row of at most 24 tokens; 7 in common with B" in text
    )
    assert f"in all runs: ε = {spent[-1].epsilon_of_all_runs:g} at δ = 0.0001" in text


@pytest.mark.filterwarnings("ignore:.*rows were longer")
def test_another_model_on_the_same_rows_knows_what_they_have_spent():
    first = trained(LINES).spent()
    with pytest.raises(
        ValueError, match="budget for these rows is used up.*keras-vaultgemma ledger"
    ):
        trained(LINES)
    with pytest.warns(UserWarning, match="had records of these data"):
        wider = trained(LINES, epsilon=5.0).spent()
    assert first.epsilon < wider.epsilon <= 5.0 and wider.steps == 2 * first.steps
    # A noise multiplier states no budget.
    with pytest.warns(UserWarning, match="had records of these data"):
        third = trained(LINES, epsilon=None, noise_multiplier=1.0).spent()
    assert third.epsilon > wider.epsilon and third.epsilon == third.epsilon_of_all_runs


@pytest.mark.filterwarnings("ignore::keras_vaultgemma.privacy.NotPrivateWarning")
def test_ids_are_known_again_and_seeded_runs_are_not_recorded():
    fit(language_model(4))
    assert machine_ledger.read_runs() == []
    x, y, weight = some_rows(ROWS)
    settings = dict(epsilon=2.0, noise_multiplier=None, seed_for_tests=None)
    model = language_model(4, dpsgd=settings)
    fit(model)
    # The model's own budget goes on, without a warning.
    model.compile(keras.optimizers.SGD(0.1), privacy=privacy.DPSGD(epsilon=4.0, delta=1e-4))
    fit(model)
    one_less = ({name: array[1:] for name, array in x.items()}, y[1:], weight[1:])
    with pytest.warns(UserWarning, match="23 records in run .*; 23 records in run"):
        fit(language_model(4, dpsgd=settings), one_less)


def test_the_ledger_of_a_machine_without_runs(capsys, tmp_path):
    assert cli.main(["ledger", "--delta", "1e-6"]) == 0
    assert f"No private runs in {tmp_path / 'home'}" in capsys.readouterr().out
    assert cli.main(["ledger", "--delta", "2"]) == 2


def test_the_command_lists_each_run_and_each_data_set(capsys, tmp_path):
    for dataset, count in ((DATA, 10), (OTHER_DATA, 20), (DATA, 30), (OTHER_KEY, 5)):
        with OpenRun(tmp_path / "model" / FILE, a_run(dataset=dataset), rows=ONE) as run:
            for _ in range(count):
                run.release()
    assert cli.main(["ledger", "--delta", "1e-6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "4 private runs on this machine" in lines[0]
    table = [line.split() for line in lines[3:7]]
    assert [row[3] for row in table] == ["A", "B", "A", "C"]
    assert [row[-3] for row in table] == ["10", "20", "30", "5"]
    assert float(table[1][5]) == accounting.round_up(composed(20, delta=1e-6))
    assert "counted as the same as C, because the key" in lines[8]
    assert "1 in common with A" in lines[9]
    assert lines[-1].endswith(f"ε = {accounting.round_up(composed(65, delta=1e-6)):g} at δ = 1e-06")
    assert json.loads((machine_ledger.read_runs()[0].folder / "about.json").read_text())[
        "ledger"
    ] == str(tmp_path / "model" / FILE)
