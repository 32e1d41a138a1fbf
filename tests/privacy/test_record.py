import keras
import pytest
from ledger_cases import DATA, OTHER_DATA, a_run
from privacy_cases import BATCH, ROWS, fit, language_model, some_rows

from keras_vaultgemma import lora
from keras_vaultgemma.privacy import DPSGD, accounting
from keras_vaultgemma.privacy.ledger import FILE, Ledger, preset_ledger, read_ledger
from keras_vaultgemma.privacy.ledger_writer import OpenRun, PrivacyRecord
from keras_vaultgemma.recipes.convert import convert
from keras_vaultgemma.recipes.describe import describe


@pytest.mark.first_backend
def test_spent_during_a_run_and_after_it():
    record = PrivacyRecord(Ledger(({"epsilon": 2.0},)))
    record.begin(OpenRun(None, a_run(), record.ledger))
    for done in (1, 2):
        record.run.release()
        expected = accounting.round_up(
            accounting.epsilon([accounting.Steps(done, 1000, 0.05, 80, 1.0)], 1e-5)
        )
        assert record.spent()[:3] == (expected, 1e-5, done)
    record.end()
    assert record.spent().steps == 2 and record.run is None
    assert record.ledger.statements == ({"epsilon": 2.0},)
    record.begin(OpenRun(None, a_run(), record.ledger))
    record.run.release()
    record.end()
    assert record.spent().steps == 3 and record.spent(1e-3).epsilon < record.spent(1e-5).epsilon


@pytest.mark.first_backend
def test_runs_on_different_data_are_separate():
    record = PrivacyRecord()
    for dataset, steps in ((DATA, 3), (OTHER_DATA, 5)):
        record.begin(OpenRun(None, a_run(dataset=dataset), record.ledger))
        for _ in range(steps):
            record.run.release()
        record.end()
    assert record.spent().steps == 5
    assert {data: spent.steps for data, spent in record.ledger.spent().items()} == {
        DATA: 3,
        OTHER_DATA: 5,
    }


def test_a_ledger_that_is_added_twice_counts_once(tmp_path):
    with OpenRun(tmp_path / FILE, a_run()) as run:
        run.release()
    record = PrivacyRecord()
    for _ in range(2):
        record.add(run.ledger)
    assert record.spent().steps == 1


@pytest.mark.usefixtures("own_key")
def test_training_without_privacy_is_recorded(tmp_path):
    """Before and after a private run, and in saved models; a model without any guarantee has an empty ledger."""
    model = language_model(4)

    def fit_plainly(epochs):
        model.compile(keras.optimizers.SGD(0.1))
        x, y, weight = some_rows(ROWS)
        model.fit(x, y, sample_weight=weight, batch_size=BATCH, epochs=epochs, verbose=0)

    fit_plainly(1)
    assert model.privacy.ledger == Ledger()
    model.compile(
        keras.optimizers.SGD(0.1), privacy=DPSGD(noise_multiplier=1.0, ledger=tmp_path / FILE)
    )
    fit(model)
    (statement,) = read_ledger(tmp_path / FILE).statements
    assert (statement["training"], statement["steps"]) == ("without privacy", 4)
    fit_plainly(2)
    fit_plainly(2)
    found = model.privacy.ledger
    assert [entry["steps"] for entry in found.statements] == [4, 8, 8] and len(found.runs) == 1
    assert found.without_privacy() == "20 steps, whose records no guarantee covers"
    assert model.privacy.spent().steps == 4

    lora.merge(model)
    model.save_to_preset(tmp_path / "saved")
    assert preset_ledger(tmp_path / "saved") == found
    assert "without privacy           20 steps, whose records" in describe(str(tmp_path / "saved"))
    convert(tmp_path / "saved", tmp_path / "converted", to="hf", progress=False)
    assert (
        "- trained without privacy since: 20 steps"
        in (tmp_path / "converted" / "README.md").read_text()
    )


@pytest.mark.first_backend
def test_training_without_privacy_is_recorded_after_private_pre_training():
    model = language_model(4)
    model.privacy.add(Ledger(({"epsilon": 2.0},)))
    model.compile(keras.optimizers.SGD(0.1))

    def stop(batch, logs):
        if batch == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fit(model, callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=stop)])
    assert model.privacy.ledger.without_privacy() == "2 steps, whose records no guarantee covers"


def test_spent_needs_a_run():
    with pytest.raises(ValueError, match="`spent` needs a private run"):
        PrivacyRecord(Ledger(({"epsilon": 2.0},))).spent()
