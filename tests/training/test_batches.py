import keras
import numpy as np
import pytest

from keras_vaultgemma.training.batches import Batches

pytestmark = pytest.mark.first_backend

X = np.arange(10)
DATA = ({"token_ids": X}, X * 10)


class Dataset(keras.utils.PyDataset):
    """Six batches that contain their index, and a list of the calls at the ends of epochs."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.calls = []

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return np.array([index]), np.array([index])

    def on_epoch_begin(self):
        self.calls.append("begin")

    def on_epoch_end(self):
        self.calls.append("end")


def epoch_of(batches):
    return [batches[i][1].tolist() for i in range(len(batches))]


def test_each_pass_has_every_row_once_in_another_order():
    batches = Batches(DATA, 4, True, seed=7)
    epochs = []
    for epoch in range(3):
        batches.start(epoch)
        epochs.append(epoch_of(batches))
        assert [len(batch) for batch in epochs[-1]] == [4, 4, 2]
        assert sorted(np.concatenate(epochs[-1])) == [i * 10 for i in range(10)]
        assert epochs[-1] == [
            (np.random.default_rng([7, epoch]).permutation(10) * 10)[i : i + 4].tolist()
            for i in (0, 4, 8)
        ]
        assert [(batches[i][0]["token_ids"] * 10).tolist() for i in range(3)] == epochs[-1]
        assert [(batches.indices(i) * 10).tolist() for i in range(3)] == epochs[-1]
    assert len({str(epoch) for epoch in epochs}) == 3
    assert Batches(DATA, 4, True, seed=8)[0][1].tolist() != epochs[0][0]


def test_an_epoch_can_start_at_any_batch():
    batches = Batches(DATA, 4, True, seed=7)
    batches.start(1)
    whole = epoch_of(batches)
    for offset in range(4):
        batches.start(1, offset)
        assert epoch_of(batches) == whole[offset:]


def test_without_shuffling_rows_keep_their_order():
    batches = Batches(DATA, 4, False, seed=7)
    batches.start(5)
    assert epoch_of(batches) == [[0, 10, 20, 30], [40, 50, 60, 70], [80, 90]]


@pytest.mark.parametrize("steps", [2, 5])
def test_epochs_continue_where_the_previous_one_ended(steps):
    batches, expected = Batches(DATA, 4, True, seed=7), []
    for pass_number in range(4):
        batches.start(pass_number)
        expected += epoch_of(batches)
    batches, found = Batches(DATA, 4, True, seed=7, steps_per_epoch=steps), []
    for epoch in range(2):
        batches.start(epoch)
        assert len(batches) == batches.steps == steps
        found += epoch_of(batches)
    assert found == expected[: 2 * steps]


def test_batches_of_a_dataset_are_shuffled_as_a_whole():
    dataset = Dataset(workers=2, use_multiprocessing=True, max_queue_size=3)
    batches = Batches(dataset, 32, True, seed=3)
    # Batches that workers prefetch would precede the position at which a run resumes.
    assert (batches.workers, batches.use_multiprocessing) == (1, False)
    assert epoch_of(batches) == [[i] for i in np.random.default_rng([3, 0]).permutation(6)]
    assert epoch_of(Batches(dataset, 32, False, seed=3)) == [[0], [1], [2], [3], [4], [5]]
    batches.on_epoch_begin()
    batches.on_epoch_end()
    assert dataset.calls == ["begin", "end"]


@pytest.mark.every_backend
def test_tensors_are_read_as_arrays():
    assert Batches(keras.ops.convert_to_tensor([1, 2, 3]), 2, False, 0)[0].tolist() == [1, 2]


def test_identity_has_what_must_be_equal_to_resume():
    identity = Batches(DATA, 4, True, seed=7).identity
    assert {**identity, "SHA-256": None} == {
        "items": 10,
        "SHA-256": None,
        "batch_size": 4,
        "shuffle": True,
        "steps_per_epoch": 3,
    }
    assert Batches(DATA, 4, True, seed=8).identity == identity
    assert (
        Batches((DATA[0], X[::-1] * 10), 4, True, seed=7).identity["SHA-256"] != identity["SHA-256"]
    )
    identity = Batches(Dataset(), 4, False, 0, 9).identity
    assert {**identity, "SHA-256": None} == {
        "items": 6,
        "SHA-256": None,
        "batch_size": 1,
        "shuffle": False,
        "steps_per_epoch": 9,
    }


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            (iter([1]), 4, True, 0),
            "`x` must be strings, arrays or a `keras.utils.PyDataset`.* Received: x of type",
        ),
        ((np.zeros(0), 4, True, 0), "`x` must have at least one row or batch. Received: x=array"),
        ((X, 0, True, 0), "`batch_size` must be a positive integer. Received: batch_size=0"),
        (
            (X, 4, "batch", 0),
            "`shuffle` must be True or False with a TrainingCheckpoint. Received: shuffle='batch'",
        ),
        (
            (X, 4, True, 0, 2.5),
            "`steps_per_epoch` must be None or a positive integer. Received: steps_per_epoch=2.5",
        ),
    ],
)
def test_arguments_out_of_range_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        Batches(*arguments)
