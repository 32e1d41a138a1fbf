import keras
import numpy as np
from common import to_numpy

from keras_vaultgemma import backend


class Halved(keras.Model):
    """Moves its weight by half the gradient of the summed squares, and counts its steps in a metric."""

    def __init__(self):
        super().__init__()
        self.weight = self.add_weight(shape=(2,), initializer="ones", name="weight")
        self.built = True
        self.count = keras.metrics.Sum(name="count")

    def call(self, x):
        return x * self.weight

    def train_step(self, *args):
        return backend.train_step(self, self._step, *args)

    def _step(self, data):
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        values = [backend.value_of(self.weight)]
        found, _ = backend.gradients(lambda w: (keras.ops.sum((x * w[0]) ** 2), ()), values)
        self.optimizer.apply([0.5 * found[0]], self.trainable_variables)
        self.count.update_state(1.0)
        return {"count": self.count.result()}


def test_weights_optimizer_and_metrics_move():
    model = Halved()
    model.compile(keras.optimizers.SGD(0.5, momentum=0.9))
    model.optimizer.build(model.trainable_variables)
    history = model.fit(np.ones((3, 2), "float32"), batch_size=1, verbose=0)
    # w -= 0.5 x² w, with momentum 0.9.
    weight, velocity = 1.0, 0.0
    for _ in range(3):
        velocity = 0.9 * velocity - 0.5 * weight
        weight += velocity
    np.testing.assert_allclose(to_numpy(model.weight), [weight] * 2, rtol=1e-6)
    assert history.history["count"] == [3.0] and int(to_numpy(model.optimizer.iterations)) == 3
