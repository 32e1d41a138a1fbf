import pytest
from test_ledger import DATA, OTHER_DATA, a_run

from keras_vaultgemma.privacy import accounting
from keras_vaultgemma.privacy.ledger import FILE, Ledger
from keras_vaultgemma.privacy.open_run import OpenRun
from keras_vaultgemma.privacy.record import PrivacyRecord


def test_what_is_spent_while_a_run_goes_on_and_after_it():
    record = PrivacyRecord(Ledger(({"epsilon": 2.0},)))
    record.begin(OpenRun(None, a_run(), record.ledger))
    for done in (1, 2):
        record.run.release()
        expected = accounting.round_up(accounting.epsilon([accounting.Steps(done, 1000, 0.05, 80, 1.0)], 1e-5))
        assert record.spent()[:3] == (expected, 1e-5, done)
    record.end()
    assert record.spent().steps == 2 and record.run is None
    assert record.ledger.statements == ({"epsilon": 2.0},)
    record.begin(OpenRun(None, a_run(), record.ledger))
    record.run.release()
    record.end()
    assert record.spent().steps == 3 and record.spent(1e-3).epsilon < record.spent(1e-5).epsilon


def test_runs_on_other_data_stand_beside_each_other():
    record = PrivacyRecord()
    for dataset, steps in ((DATA, 3), (OTHER_DATA, 5)):
        record.begin(OpenRun(None, a_run(dataset=dataset), record.ledger))
        for _ in range(steps):
            record.run.release()
        record.end()
    assert record.spent().steps == 5
    assert {data: spent.steps for data, spent in record.ledger.spent().items()} == {DATA: 3, OTHER_DATA: 5}


def test_a_loaded_ledger_is_taken_over_once(tmp_path):
    with OpenRun(tmp_path / FILE, a_run()) as run:
        run.release()
    record = PrivacyRecord()
    for _ in range(2):
        record.add(run.ledger)
    assert record.spent().steps == 1


def test_nothing_is_spent_without_a_run():
    with pytest.raises(ValueError, match="`spent` needs a private run"):
        PrivacyRecord(Ledger(({"epsilon": 2.0},))).spent()
