"""TODO."""

import keras

from keras_vaultgemma import backend


class Initial:
    """Where a layer's variables start: random, or at stored values.

    Args:
        initializer_range: standard deviation of random values.
        values: `{variable path: value with read(dtype)}`, or None for random ones; each is taken out once it was read.
        path: of the layer, to which names of variables are appended.
    """

    def __init__(self, initializer_range, values=None, path=""):
        self.initializer_range, self.values, self.path = initializer_range, values, path

    def below(self, name):
        """The same for the variables of a sublayer."""
        return Initial(self.initializer_range, self.values, f"{self.path}{name}/")

    def __call__(self, name, random=None):
        """A Keras initializer for the variable `name`; `random` replaces the normal distribution."""
        if self.values is not None:

            def stored(shape, dtype, layout=None):
                return backend.from_numpy(
                    self._stored(self.path + name, tuple(shape)).read(dtype), layout
                )

            return stored
        # A new initializer each time: one instance would give two matrices of a shape the same values.
        return random or keras.initializers.RandomNormal(stddev=self.initializer_range)

    def _stored(self, path, shape):
        value = self.values.pop(path, None)
        if value is None or tuple(value.shape) != shape:
            found = None if value is None else tuple(value.shape)
            raise ValueError(f"The value of {path} must have the shape {shape}. Received: {found}")
        return value
