"""Models, data and plain computations that the tests of privacy share."""

import functools

import keras
import numpy as np
from common import LINES, one_layer_preset, random_backbone, to_numpy, value_and_gradients
from keras import ops

from keras_vaultgemma import VaultGemmaCausalLM, backend, privacy
from keras_vaultgemma.privacy import mechanism

C = 0.7
SMALL = dict(num_layers=1, vocabulary_size=48, hidden_dim=24, intermediate_dim=32, head_dim=8)
CAPS = dict(attention_logit_soft_cap=3.0, final_logit_soft_cap=4.0)
MODELS = {
    "full": dict(SMALL),
    "full, both caps": dict(SMALL, **CAPS),
    "LoRA": dict(SMALL, lora=True),
    "LoRA, both caps": dict(SMALL, lora=True, **CAPS),
}


def private_model(lora=False, clip_norm=C, **changes):
    model = VaultGemmaCausalLM(random_backbone(**changes))
    if lora:
        model.backbone.enable_lora(4, ["query", "value", "down"])
        for v in model.trainable_variables:  # B starts at 0, and A would have no gradient
            v.assign(np.random.default_rng(len(v.path)).normal(0, 0.2, v.shape))
    settings = privacy.DPSGD(noise_multiplier=1.0, clip_norm=clip_norm, delta=1e-5)
    model.compile(keras.optimizers.SGD(1.0), privacy=settings)
    return model


@functools.cache
def shared(name):
    """One of `MODELS`, which no test may change, and its compiled functions."""
    keras.utils.set_random_seed(0)
    return private_model(**MODELS[name])


def some_rows(count, length=9, vocabulary_size=48, seed=0):
    """Rows of different lengths and hardness, so that some gradients are clipped and others are not."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, vocabulary_size, (count, length + 1)).astype("int32")
    weights = (np.arange(length) < rng.integers(1, length + 1, (count, 1))).astype("int32")
    mask = np.ones((count, length), "int32")
    return {"token_ids": ids[:, :-1], "padding_mask": mask}, ids[:, 1:], weights


def take(rows, indices):
    return keras.tree.map_structure(lambda array: array[indices], rows)


def sum_of(model, rows, count=None, size=1):
    """`ClippedSum` of some rows, compiled as in `fit`, with NumPy arrays."""
    model.private_training.microbatch = size
    found = compiled(model)(rows, np.int32(len(rows[1]) if count is None else count))
    return mechanism.ClippedSum(
        [to_numpy(g) for g in found[0]], C, *map(float, map(to_numpy, found[1:]))
    )


def compiled(model):
    training = model.private_training
    return compiled_sum(model, training.microbatch, training.settings.clip_norm)


@functools.cache
def compiled_sum(model, microbatch, clip_norm):
    """Compile the sum with the model's microbatch and clipping norm, which are the arguments."""

    def function(rows, count):
        clipped, _ = model.private_training.clipped_sum(rows, count)
        return clipped.gradients, clipped.loss, clipped.clipped, clipped.not_finite

    variables = [*model.variables, *model.metrics_variables]
    run = backend.compile_function(function, variables, jit_compile=False)
    return lambda rows, count: run(
        keras.tree.map_structure(ops.convert_to_tensor, rows), ops.convert_to_tensor(count)
    )


def plain_gradients(model, rows):
    """Each row's gradient and loss by Keras's own loss on logits: the slow, obvious way."""

    def loss(x, y, weight):
        logits = model.logits(model.backbone(x, training=True))
        each = keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)
        weight = ops.cast(weight, "float32")
        return ops.sum(each * weight) / ops.sum(weight)

    of_row = value_and_gradients(loss, model.trainable_variables)
    losses, found = [], []
    for i in range(len(rows[1])):
        row = keras.tree.map_structure(ops.convert_to_tensor, take(rows, [i]))
        value, gradients = of_row(*row)
        losses.append(float(value))
        found.append([g.astype("float64") for g in gradients])
    return found, losses


def plain_sum(found, clip_norm=C):
    """Sum of the clipped gradients in float64."""
    norms = [np.sqrt(sum((g**2).sum() for g in row)) for row in found]
    parts = [
        [g * min(1, clip_norm / norm) for g in row] for row, norm in zip(found, norms, strict=True)
    ]
    return [sum(column) for column in zip(*parts, strict=True)], np.array(norms)


def noise_of(seed, shape, secure=False):
    """The noise of a seed, int32 or uint32 of shape `[4]`, with a standard deviation of 1."""
    clipped = mechanism.ClippedSum([ops.zeros(shape)], 1.0, 0.0, 0.0, 0.0)
    seeds = ops.convert_to_tensor(np.asarray(seed)[None].view("int32"))
    return to_numpy(mechanism.noised_mean(clipped, 1.0, seeds, 1.0, secure)[0])


def distance(one, other):
    return np.sqrt(
        sum(
            ((a.astype("float64") - b.astype("float64")) ** 2).sum()
            for a, b in zip(one, other, strict=True)
        )
    )


ROWS, BATCH = 24, 6


def language_model(
    rank=None, optimizer=None, dpsgd=None, compile_arguments=None, lora_arguments=None, **changes
):
    keras.utils.set_random_seed(1)
    model = VaultGemmaCausalLM(random_backbone(**{**SMALL, **changes}))
    if rank:
        model.backbone.enable_lora(rank, **(lora_arguments or {}))
    settings = {
        "noise_multiplier": 1.0,
        "delta": 1e-4,
        "clip_norm": C,
        "seed_for_tests": 5,
        **(dpsgd or {}),
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    optimizer = optimizer or keras.optimizers.SGD(1.0)
    model.compile(optimizer, privacy=privacy.DPSGD(**settings), **(compile_arguments or {}))
    return model


def fit(model, rows=None, **arguments):
    x, y, weight = rows or some_rows(ROWS)
    return model.fit(
        x, y, sample_weight=weight, **{"batch_size": BATCH, "verbose": 0, **arguments}
    ).history


def values(model):
    return [to_numpy(v).copy() for v in model.trainable_variables]


def tiny_model(**settings):
    model = VaultGemmaCausalLM.from_preset(one_layer_preset())
    model.preprocessor.sequence_length = 24
    model.backbone.enable_lora(4)
    settings = {"noise_multiplier": 1.0, "delta": 1e-4, **settings}
    model.compile(keras.optimizers.Adam(1e-3), privacy=privacy.DPSGD(**settings))
    return model


PAIRS = {"prompts": LINES, "responses": LINES[::-1]}
CHATS = [
    [{"role": "user", "content": line}, {"role": "assistant", "content": "I see."}]
    for line in LINES
]


class TwoTexts(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return LINES[2 * index : 2 * index + 2]
