import copy
import pickle

import h5py
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

pytestmark = pytest.mark.first_backend


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
    assert "- without privacy since: 20 steps" in (tmp_path / "converted" / "README.md").read_text()


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


def retrained(copy):
    """The guarantee after another run of four steps on the same rows."""
    # One row at a time, because adapters come back merged from Keras's files.
    settings = DPSGD(noise_multiplier=1.0, extend_budget=True, microbatch_size=1)
    copy.compile(keras.optimizers.SGD(0.1), privacy=settings)
    fit(copy)
    return copy.privacy.ledger.spent_on(copy.privacy.dataset, 1e-5)


def via_file(model, folder):
    model.save(folder / "model.keras")
    return keras.saving.load_model(folder / "model.keras")


def via_weights(model, folder):
    model.save_weights(folder / "model.weights.h5")
    copy_ = language_model(4)
    copy_.load_weights(folder / "model.weights.h5")
    return copy_


def via_backbone(model, folder):
    model.backbone.save_weights(folder / "model.weights.h5")
    copy_ = language_model(4)
    copy_.backbone.load_weights(folder / "model.weights.h5")
    return copy_


COPIES = {
    "save": via_file,
    "save_weights": via_weights,
    "backbone": via_backbone,
    "deepcopy": lambda model, folder: copy.deepcopy(model),
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.filterwarnings("ignore:Earlier private runs on this machine")
@pytest.mark.parametrize("way", COPIES)
def test_copies_of_weights_carry_their_ledger(tmp_path, way):
    model = language_model(4, dpsgd=dict(seed_for_tests=None))
    fit(model)
    copied = COPIES[way](model, tmp_path)
    assert copied.privacy.ledger == model.privacy.ledger and copied.privacy.spent().uncovered == ""
    assert retrained(copied) == retrained(model)
    assert retrained(copied).steps == 12


def test_copies_carry_training_without_privacy(tmp_path):
    model = language_model(4)
    model.compile(keras.optimizers.SGD(0.1))
    fit(model)
    x, y, weight = some_rows(2)
    model.train_on_batch(x, y, weight)
    copied = via_weights(model, tmp_path)
    assert copied.privacy.ledger == model.privacy.ledger == Ledger()
    assert retrained(copied).uncovered == "5 steps, whose records no guarantee covers"


def by_set_weights(model, copied, folder):
    copied.set_weights(model.get_weights())


def by_set_weights_of_the_backbone(model, copied, folder):
    copied.backbone.set_weights(model.backbone.get_weights())


def by_an_old_file(model, copied, folder):
    """One that no ledger was written into."""
    path = folder / "model.weights.h5"
    model.save_weights(path)
    with h5py.File(path, "r+") as file:
        found = []
        file.visit(lambda name: found.append(name) if name.endswith(FILE) else None)
        assert len(found) == 1
        del file[found[0]]
    copied.load_weights(path)


@pytest.mark.filterwarnings("ignore:Earlier private runs on this machine")
@pytest.mark.parametrize(
    "move",
    [by_set_weights, by_set_weights_of_the_backbone, by_an_old_file],
    ids=lambda f: f.__name__,
)
def test_weights_of_unknown_history(tmp_path, move):
    """Where the ledger cannot travel with the weights, the next guarantee says so."""
    model, copied = (language_model(4, dpsgd=dict(seed_for_tests=None)) for _ in range(2))
    fit(model)
    move(model, copied, tmp_path)
    assert "weights of unknown history (`" in retrained(copied).uncovered
    copied.save_to_preset(tmp_path / "saved")
    assert "weights of unknown history" in preset_ledger(tmp_path / "saved").without_privacy()


@pytest.mark.parametrize("is_private", [True, False], ids=["private", "plain"])
def test_weights_that_a_callback_brings_back_are_known(is_private):
    """As `EarlyStopping(restore_best_weights=True)` does."""
    model = language_model(4, dpsgd=dict(seed_for_tests=None))
    if not is_private:
        model.compile(keras.optimizers.SGD(0.1))
    keep = {}

    def on_epoch_end(epoch, logs):
        keep.setdefault("weights", model.get_weights())

    back = keras.callbacks.LambdaCallback(
        on_epoch_end=on_epoch_end, on_train_end=lambda logs: model.set_weights(keep["weights"])
    )
    fit(model, epochs=2, callbacks=[back])
    assert "unknown" not in model.privacy.everything.without_privacy()
    if is_private:
        assert model.privacy.spent().uncovered == "" and model.privacy.spent().steps == 8
    else:
        assert model.privacy.ledger == Ledger()
