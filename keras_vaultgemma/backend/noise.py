"""Normal deviates from a seed of 128 bits."""

import numpy as np

from keras_vaultgemma.backend.choice import NAME


def normal(seed, shape):
    """Independent standard normal deviates, float32; the same for the same seed on the same backend.

    The generator takes all bits of the seed: Philox (Salmon et al., 2011, doi:10.1145/2063384.2063405) on TensorFlow
    and PyTorch, XLA's default of the device on JAX. PyTorch's deviates are NumPy's, for `torch.Generator` on a CPU
    reads 32 bits of a seed.

    Args:
        seed: int32 [4], a tensor.
        shape: tuple.
    """
    if NAME == "jax":
        import jax

        # JAX's other generators have keys of 64 bits.
        key = jax.random.wrap_key_data(jax.lax.bitcast_convert_type(seed, "uint32"), impl="rbg")
        return jax.random.normal(key, shape, "float32")
    if NAME == "tensorflow":
        import tensorflow as tf

        pairs = tf.bitcast(tf.reshape(seed, (2, 2)), "int64")
        return tf.random.stateless_normal(shape, pairs, dtype="float32", alg="philox")
    import torch

    key = np.ascontiguousarray(seed.cpu().numpy()).view("<u8")
    deviates = np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, "float32")
    return torch.from_numpy(np.asarray(deviates)).to(seed.device)
