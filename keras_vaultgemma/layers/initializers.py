"""Initial values of variables that come from a checkpoint."""

from keras_vaultgemma import backend


class StoredValues:
    """Stored values that the variables of a layer start from.

    A variable is then created with its value, so that random values, 8 to 16 s of work for
    VaultGemma 1B, are never drawn.

    Args:
        values: dict from variable paths to values with `shape` and `read(dtype)`. Each value is
            removed once it was read.
        path: string. Path of the layer, to which names of variables are appended. Defaults to the
            root.
    """

    def __init__(self, values, path=""):
        self.values, self.path = values, path

    def sublayer(self, name):
        """Return the stored values of a sublayer."""
        return StoredValues(self.values, f"{self.path}{name}/")

    def initializer(self, name):
        """Return a Keras initializer that reads the stored value of the variable `name`."""

        def read(shape, dtype, layout=None):
            return backend.from_numpy(self._pop(self.path + name, tuple(shape)).read(dtype), layout)

        return read

    def _pop(self, path, shape):
        value = self.values.pop(path, None)
        if value is None or tuple(value.shape) != shape:
            found = None if value is None else tuple(value.shape)
            raise ValueError(f"The value of {path} must have the shape {shape}. Received: {found}")
        return value
