"""The noise of a step: normal far into the tails, without a lattice, and useless to an attacker."""

import functools
import itertools

import keras
import numpy as np
import pytest
from common import to_numpy
from keras import ops
from privacy_cases import noise_of, private_model, some_rows
from scipy import stats

from keras_vaultgemma import backend
from keras_vaultgemma.backend import blocks
from keras_vaultgemma.privacy import mechanism
from keras_vaultgemma.privacy import noise as noise_module
from keras_vaultgemma.privacy.seeds import noise_seed


@functools.cache
def compiled_release(deviation):
    def function(total, seeds):
        clipped = mechanism.ClippedSum([total], 1.0, 0.0, 0.0, 0.0)
        return mechanism.noised_mean(clipped, deviation, seeds, 1.0)[0]

    return backend.compile_function(function, [], jit_compile=False)


def release(total, seed=0, deviation=1.0):
    """What a step releases for one variable whose clipped sum is `total`."""
    seeds = np.random.default_rng(seed).integers(-(2**31), 2**31, (1, 4)).astype("int32")
    total = np.array(total, "float32")  # a copy, which is overwritten
    run = compiled_release(deviation)
    return to_numpy(run(*map(ops.convert_to_tensor, (total, seeds))))


def noise(size, seed=0):
    return release(np.zeros(size), seed)


def check_tails(count, bounds, parts):
    found = dict.fromkeys(bounds, 0)
    for part in range(parts):
        z = np.abs(noise(count // parts, part))
        found = {bound: n + int((z > bound).sum()) for bound, n in found.items()}
    for bound, n in found.items():
        expected = 2 * stats.norm.sf(bound) * count
        # Missed once in 100,000 runs by a correct generator.
        low, high = stats.poisson.ppf([5e-6, 1 - 5e-6], expected)
        assert low <= n <= high, (bound, n, expected)


ZEROS, ONES = "00000000 " * 4, "ffffffff " * 4
KNOWN = {  # of Random123, `threefry4x32 20`: counter, key, result
    "zeros": (ZEROS, ZEROS, "9c6ca96a e17eae66 fc10ecd4 5256a7d8"),
    "ones": (ONES, ONES, "2a881696 57012287 f6c7446e a16a6732"),
    "pi": (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0 082efa98 ec4e6c89",
        "59cd1dbb b8879579 86b5d00c ac8b6d84",
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_answers_of_threefry(name):
    counter, key, expected = (
        np.array([int(word, 16) for word in words.split()], "uint32") for words in KNOWN[name]
    )
    tensors = [list(map(ops.convert_to_tensor, x.view("int32"))) for x in (key, counter)]
    found = [int(to_numpy(word)) & 0xFFFFFFFF for word in noise_module.threefry(*tensors)]
    assert found == expected.tolist()


RFC_8439 = """e4e7f110 15593bd1 1fdd0f50 c47120a3 c7f4d1c7 0368c033 9aaa2204 4e6cd4c3
466482d2 09aa9f07 05d7c214 a2028bd9 d19c12b5 b94e16de e883d0cb 4e3c50a2"""


def test_known_answer_of_chacha20():
    """The example of RFC 8439, section 2.3.2."""
    key = np.frombuffer(bytes(range(32)), "<i4")
    counter = np.frombuffer(bytes.fromhex("01000000 00000009 0000004a 00000000"), "<i4")
    tensors = [list(map(ops.convert_to_tensor, x)) for x in (key, counter)]
    found = [int(to_numpy(word)) & 0xFFFFFFFF for word in noise_module.chacha20(*tensors)]
    assert found == [int(word, 16) for word in RFC_8439.split()]


def plain_chacha20(key, counter):
    """16 words, in Python's integers, for a key of 128 bits."""
    x = [*np.frombuffer(b"expand 16-byte k", "<u4"), *key, *key, *counter]
    x = [int(word) for word in x]
    first = list(x)

    def turn(word, bits):
        return (word << bits | word >> (32 - bits)) & 0xFFFFFFFF

    for i in range(20):
        for j in range(4):
            a, b, c, d = (4 * k + (j + k * (i % 2)) % 4 for k in range(4))
            for left, right in ((16, 12), (8, 7)):
                x[a] = (x[a] + x[b]) & 0xFFFFFFFF
                x[d] = turn(x[d] ^ x[a], left)
                x[c] = (x[c] + x[d]) & 0xFFFFFFFF
                x[b] = turn(x[b] ^ x[c], right)
    return np.array([(a + b) & 0xFFFFFFFF for a, b in zip(x, first, strict=True)], "uint32")


def box_muller(words):
    """The sum of deviates from four arrays of random bits, in float64."""
    deviates = []
    for bits, angle in (words[:2], words[2:]):
        part = ((bits & 0x7FFFFFFF) + 0.5) / 2.0**32
        radius = np.sqrt(-2 * np.where(bits < 0, np.log(part), np.log1p(-part)))
        deviates += [radius * np.cos(angle * np.pi / 2**31), radius * np.sin(angle * np.pi / 2**31)]
    return np.dot([0.5**0.5, 2.0**-18, 0.5**0.5, 2.0**-36], deviates)


@pytest.mark.parametrize("size", [1, 11])
def test_secure_noise_equals_the_formula(size):
    seed = np.random.default_rng(3).integers(0, 2**32, 4).astype("uint32")
    count = -(-size // 4)
    blocks_of_words = np.stack([plain_chacha20(seed, [i, 0, 0, 0]) for i in range(count)])
    words = [blocks_of_words[:, i::4].T.ravel()[:size].view("int32") for i in range(4)]
    found = noise_of(seed, (size,), secure=True)
    np.testing.assert_allclose(found, box_muller(words), rtol=1e-5, atol=2e-6)


def test_secure_noise_repeats_nowhere():
    """Also across the blocks that PyTorch computes, of which the last is not a multiple of 4."""
    seed = np.arange(4, dtype="uint32")
    found = noise_of(seed, (2 * blocks.BLOCK + 5,), secure=True).astype("float64")
    assert stats.kstest(found, "norm").pvalue > 1e-3
    assert len(np.unique(found)) > 0.98 * len(found)
    for distance in (1, blocks.BLOCK, len(found) // 4):
        assert abs(np.mean(found[distance:] * found[:-distance])) < 5 / len(found) ** 0.5
    assert not np.any(found == noise_of(seed + 1, found.shape, secure=True))


def plain_noise(seed, size):
    """The formula of the module in NumPy's float64, from the words of `threefry`."""
    if backend.NAME == "torch":
        starts = range(0, size, blocks.BLOCK)
        generators = [np.random.Philox(key=seed.view("<u8"), counter=[0, i, 0, 0]) for i in starts]
        parts = [np.random.Generator(g).standard_normal(blocks.BLOCK) for g in generators]
        return np.concatenate(parts)[:size]
    tensors = [ops.convert_to_tensor(word) for word in seed]
    index = ops.arange(size, dtype="int32")
    words = [to_numpy(w) for w in noise_module.threefry(tensors, [index, 0, 0, 0])]
    return box_muller(words)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (200_000,)])
def test_equal_to_the_formula(shape):
    """On all backends, and in blocks of PyTorch."""
    seed = np.random.default_rng(3).integers(-(2**31), 2**31, 4).astype("int32")
    expected = plain_noise(seed, np.prod(shape)).reshape(shape)
    np.testing.assert_allclose(noise_of(seed, shape), expected, rtol=1e-5, atol=2e-6)


def test_extreme_bits_give_finite_numbers():
    """The largest radius is above 6.7, so that the sum of two reaches 9.5, and the smallest is not 0."""
    bits = np.array([0, -1, -(2**31), 2**31 - 1, 1], "int32")
    found = np.array(
        [to_numpy(x) for x in noise_module._box_muller(*[ops.convert_to_tensor(bits)] * 2)]
    )
    radius = np.hypot(*found)
    assert np.isfinite(found).all() and radius.min() > 1e-5 and 6.7 < radius.max() < 7


def test_steps_variables_and_secrets_are_independent():
    """A restart has another secret (`seeds`)."""
    streams = [
        noise_of(noise_seed(secret, step, variable), (100_000,))
        for secret, step, variable in itertools.product(
            (bytes(16), bytes(15) + b"\1"), (0, 1), (0, 1)
        )
    ]
    correlations = np.corrcoef(streams) - np.eye(len(streams))
    assert np.abs(correlations).max() < 5 / 100_000**0.5
    assert len({stream[:4].tobytes() for stream in streams}) == len(streams)


@pytest.mark.parametrize("bit", [0, 31])
@pytest.mark.parametrize("word", range(4))
def test_every_bit_of_the_seed_counts(word, bit):
    seeds = np.full((2, 4), 7, "uint32")
    seeds[1, word] ^= np.uint32(1 << bit)
    assert not np.any(noise_of(seeds[0], (64,)) == noise_of(seeds[1], (64,)))


def test_it_is_normal():
    """Its distribution function, its moments, and the share beyond 2 to 5 standard deviations."""
    z = noise(2_000_000).astype("float64")
    assert stats.kstest(z, "norm").pvalue > 1e-3
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        spread = stats.norm.moment(2 * power) - moment**2
        assert abs((z**power).mean() - moment) < 4.5 * (spread / z.size) ** 0.5
    check_tails(8_000_000, (2, 3, 3.5, 4, 4.5, 5), parts=4)


@pytest.mark.long
def test_its_tails_to_six_standard_deviations():
    check_tails(2_000_000_000, (4, 4.5, 5, 5.5, 6), parts=200)


def test_it_is_symmetric_and_independent_of_its_neighbours():
    z = noise(2_000_000).astype("float64")
    assert stats.ks_2samp(z[:1_000_000], -z[1_000_000:]).pvalue > 1e-3
    for distance in (1, 2, 3, 1152, 2**17):
        assert abs((z[distance:] * z[:-distance]).mean()) < 4.5 / z.size**0.5


@pytest.mark.parametrize("total", [0.0, 1e-7, 0.3], ids=str)
def test_every_float32_can_occur(total):
    """The last eight bits of what is released are uniform, from numbers near 0 into the tails."""
    found = np.abs(release(np.full(6_000_000, total, "float32")))
    edges = [2.0**-12, 2.0**-8, 2.0**-4, 0.5, 1, 2, 4, 8]
    for low, high in itertools.pairwise(edges):
        part = found[(found >= low) & (found < high)]
        assert len(part) > 200
        bits = part.view("uint32") & (0xFF if len(part) > 5000 else 0xF)
        counts = np.bincount(bits, minlength=bits.max() + 1)
        assert stats.chisquare(counts).pvalue > 1e-5, (low, high)


def off_the_lattice(z):
    """How many of the |z| > 3.5 no deviate of JAX's float32 generator comes near; and how many there are.

    The generator turns one of 2^23 uniform numbers into a deviate. Out there, they are 3e-4 apart.
    """
    import jax

    uniform = np.arange(2**22 - 2**12, 2**22) / 2.0**22
    both = np.float32([uniform + 2.0**-24, -uniform + 2.0**-24]).clip(-1 + 2.0**-24, 1 - 2.0**-24)
    values = np.sort(np.asarray(jax.lax.erf_inv(both)).ravel() * np.float32(2**0.5))
    z = z[np.abs(z) > 3.5]
    at = np.clip(np.searchsorted(values, z), 1, len(values) - 1)
    nearest = np.minimum(np.abs(z - values[at - 1]), np.abs(z - values[at]))
    return int((nearest > 1e-5).sum()), len(z)


def add_float32_deviates(total, rest, deviation, seed, secure):
    """Noise as it was before: one deviate of JAX's generator."""
    import jax

    key = jax.random.wrap_key_data(seed.astype("uint32"), impl="rbg")
    return total + deviation * jax.random.normal(key, total.shape)


@pytest.mark.skipif(backend.NAME != "jax", reason="the attack knows JAX's generator")
@pytest.mark.filterwarnings("ignore:Earlier private runs on this machine")
@pytest.mark.parametrize("generator", ["float32", "ours"])
def test_the_attack_on_floating_point_noise(monkeypatch, generator):
    """Membership of one row after one step of SGD is certain with a float32 generator, and hidden here.

    The attacker knows the weights before and after. Where z is none of the generator's values, a gradient was added.
    """
    if generator == "float32":
        monkeypatch.setattr(mechanism, "add_noise", add_float32_deviates)
    suspicious = []
    for weight in (0, 1):
        model = private_model(vocabulary_size=6000, hidden_dim=64, num_layers=1, clip_norm=1.0)
        model.private_training.settings.noise_multiplier = 30.0
        x, y, weights_of_rows = some_rows(4)
        weights_of_rows[:] = [[weight], [0], [0], [0]]
        before = np.concatenate([to_numpy(v).ravel() for v in model.trainable_variables])
        stop = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs, model=model: setattr(
                model, "stop_training", True
            )
        )
        model.fit(x, y, sample_weight=weights_of_rows, batch_size=4, verbose=0, callbacks=[stop])
        after = np.concatenate([to_numpy(v).ravel() for v in model.trainable_variables])
        suspicious.append(off_the_lattice((before - after).astype("float64") * 4 / 30))
    (without, count), (with_row, its_count) = suspicious
    assert count > 100
    if generator == "float32":
        # None, and about 15, a number that varies from run to run like a Poisson variable.
        assert without <= 1 and with_row >= 3
    else:
        # Nearly everything is off the lattice, with the row and without it.
        assert min(without / count, with_row / its_count) > 0.8
