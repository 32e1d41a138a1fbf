"""The chunked cross-entropy, compared with the one of all logits at once."""

import re

import keras
import numpy as np
import pytest
from common import gradients, random_backbone, shapes_made, to_numpy
from keras import ops

from keras_vaultgemma import VaultGemmaCausalLM, backend
from keras_vaultgemma.backend import blocks
from keras_vaultgemma.layers.reversible_embedding import ReversibleEmbedding
from keras_vaultgemma.training import logit_term, loss
from keras_vaultgemma.training.logit_term import LogitTerm

N, V, D, K = 37, 100, 24, 3
RANDOM = np.random.default_rng(0)
ROWS, TABLE = (
    RANDOM.normal(size=(N, D)).astype("float32"),
    RANDOM.normal(size=(V, D)).astype("float32"),
)
MORE_ROWS, MORE_TABLE = (
    RANDOM.normal(size=(N, K)).astype("float32"),
    RANDOM.normal(size=(V, K)).astype("float32"),
)
TARGETS = RANDOM.integers(0, V, N)
WEIGHTS = (RANDOM.random(N) * (RANDOM.random(N) > 0.3)).astype("float32")
IDS = np.random.default_rng(1).integers(1, 128, (4, 11))
LENGTHS = np.array([11, 7, 2, 5])
WEIGHTS_ALONE = keras.quantizers.Int8QuantizationConfig(activation_quantizer=None)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """On PyTorch's CPU the rows of a chunk are computed in several blocks."""
    monkeypatch.setattr(blocks, "BLOCK", 4 * V)


def plain(logits, cap=None):
    """Return losses and `is_correct`, from all logits at once in float64."""
    logits = logits.astype("float64")
    logits = logits if cap is None else cap * np.tanh(logits / cap)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(N), TARGETS]
    return losses * (WEIGHTS > 0), (logits.argmax(1) == TARGETS) * (WEIGHTS > 0)


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("chunk_size", [None, 1, 7, 8, 64])
@pytest.mark.parametrize("with_gradient", [True, False])
def test_equals_the_plain_loss(cap, chunk_size, with_gradient):
    terms = [LogitTerm(ROWS, TABLE), LogitTerm(MORE_ROWS, MORE_TABLE, is_trained=True)]
    total, losses, is_correct = loss.cross_entropy(
        terms, TARGETS, WEIGHTS, cap, with_gradient, chunk_size
    )
    expected, expected_is_correct = plain(ROWS @ TABLE.T + MORE_ROWS @ MORE_TABLE.T, cap)
    np.testing.assert_allclose(to_numpy(losses), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(to_numpy(is_correct), expected_is_correct)
    np.testing.assert_allclose(to_numpy(total), (WEIGHTS * expected).sum(), rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 4, 5])
def test_tokens_of_weight_0_do_not_affect_gradients_even_if_not_finite(chunk_size):
    """In a chunk of their own, and in one with other tokens."""
    rows, table = (
        keras.Variable(np.where(WEIGHTS[:, None] > 0, ROWS, np.nan)),
        keras.Variable(TABLE),
    )

    def total():
        terms = [LogitTerm(rows.value, backend.value_of(table), is_trained=True)]
        return loss.cross_entropy(terms, TARGETS, WEIGHTS, chunk_size=chunk_size)[0]

    logits = ROWS @ TABLE.T
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    logit_gradient = WEIGHTS[:, None] * (probabilities - np.eye(V)[TARGETS])
    row_gradient, table_gradient = gradients(total, [rows, table])
    np.testing.assert_allclose(row_gradient, logit_gradient @ TABLE, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(table_gradient, logit_gradient.T @ ROWS, rtol=1e-4, atol=1e-5)


def test_tokens_of_weight_0_are_not_computed():
    weights = np.zeros(N, "float32")
    weights[[3, 5, 20, 31]] = 1
    rows = np.where(weights[:, None] > 0, ROWS, np.nan).astype("float32")
    total, losses, _ = loss.cross_entropy([LogitTerm(rows, TABLE)], TARGETS, weights, chunk_size=2)
    logits = ROWS @ TABLE.T
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(N), TARGETS]
    np.testing.assert_allclose(to_numpy(losses), expected * weights, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(to_numpy(total), expected[weights > 0].sum(), rtol=1e-5)
    total, losses, _ = loss.cross_entropy([LogitTerm(rows, TABLE)], TARGETS, np.zeros(N))
    assert to_numpy(total) == 0 and not to_numpy(losses).any()


def test_the_first_of_equal_logits_is_the_argmax():
    """16-bit logits are often equal."""
    table = np.array([[0.0], [1.0], [-1.0], [1.0]], "float32")
    rows = np.ones((4, 1), "float32")
    _, _, is_correct = loss.cross_entropy([LogitTerm(rows, table)], np.arange(4), np.ones(4))
    assert to_numpy(is_correct).tolist() == [0, 1, 0, 0]


def test_accuracy_logit_gradient_in_bfloat16_is_that_of_argmax():
    random = np.random.default_rng(4)
    rows, table = (
        random.integers(-2, 3, (N, 3)).astype("float32"),
        random.integers(-2, 3, (V, 3)).astype("float32"),
    )
    logits = rows @ table.T
    ties = (logits == logits.max(1, keepdims=True)).sum(1)
    assert (ties > 1).sum() > N / 2
    targets = np.where(
        np.arange(N) % 2, logits.argmax(1), V - 1 - logits[:, ::-1].argmax(1)
    )  # the first or the last
    rows, table = ops.cast(rows, "bfloat16"), ops.cast(table, "bfloat16")
    _, _, is_correct = loss.cross_entropy(
        [LogitTerm(rows, table)], targets, np.ones(N), chunk_size=7
    )
    np.testing.assert_array_equal(to_numpy(is_correct), logits.argmax(1) == targets)


@pytest.mark.parametrize("target", [-100, V, 10**6])
@pytest.mark.parametrize("chunk_size", [None, 7])
def test_targets_of_weight_0_may_be_anything(target, chunk_size):
    """Also in a chunk with tokens of other weights."""
    rows, table = keras.Variable(ROWS), keras.Variable(TABLE)

    def total(targets):
        term = LogitTerm(rows.value, table.value, is_trained=True)
        return loss.cross_entropy([term], targets, WEIGHTS, 5.0, True, chunk_size)[0]

    targets = np.where(WEIGHTS > 0, TARGETS, target)
    assert to_numpy(total(targets)) == to_numpy(total(TARGETS))
    found, expected = (gradients(lambda y=y: total(y), [rows, table]) for y in (targets, TARGETS))
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one).max() > 0.1
        np.testing.assert_array_equal(one, other)


def trained(
    auto,
    backbone_options=(),
    dtype=None,
    lora_rank=None,
    targets=None,
    sample_weight=None,
    mode=None,
    **compile_options,
):
    """Return weights and logs after one step of SGD, with our loss (`auto`) or with Keras's."""
    keras.utils.set_random_seed(0)
    backbone = random_backbone(dtype=dtype, **{"num_layers": 1, **dict(backbone_options)})
    model = VaultGemmaCausalLM(backbone)
    if mode:
        model.quantize("int8", config=mode)
    if lora_rank:
        model.backbone.enable_lora(lora_rank, targets)
        # B starts at zero, where A has no gradient.
        for variable in model.trainable_variables:
            variable.assign(np.random.default_rng(2).normal(0, 0.1, variable.shape))
    losses = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    )
    metrics = [keras.metrics.SparseCategoricalAccuracy()]
    if not auto:
        compile_options |= dict(loss=losses, weighted_metrics=metrics)
    model.compile(keras.optimizers.SGD(1.0), **compile_options)
    mask = (np.arange(10) < LENGTHS[:, None]).astype("int32")
    weights = mask if sample_weight is None else mask * sample_weight
    data = dict(
        x={"token_ids": IDS[:, :-1], "padding_mask": mask},
        y=IDS[:, 1:],
        sample_weight=weights,
        batch_size=4,
    )
    logs = model.fit(**data, verbose=0).history
    return [to_numpy(v) for v in model.trainable_variables], logs | model.evaluate(
        **data, verbose=0, return_dict=True
    )


@pytest.mark.parametrize(
    "options",
    [
        dict(backbone_options=dict(num_layers=2)),
        pytest.param(
            dict(backbone_options=dict(final_logit_soft_cap=3.0, attention_logit_soft_cap=2.0)),
            marks=pytest.mark.first_backend,
        ),
        pytest.param(
            dict(lora_rank=2, backbone_options=dict(num_key_value_heads=2)),
            marks=pytest.mark.first_backend,
        ),
        pytest.param(
            dict(sample_weight=np.array([[0.5], [2.0], [0.0], [1.0]])),
            marks=pytest.mark.first_backend,
        ),
        pytest.param(dict(run_eagerly=True), marks=pytest.mark.first_backend),
        pytest.param(
            dict(
                lora_rank=2,
                targets=["token_embedding", "up"],
                backbone_options=dict(final_logit_soft_cap=3.0),
            ),
            marks=pytest.mark.first_backend,
        ),
        dict(lora_rank=2, targets=["token_embedding", "up"], mode=WEIGHTS_ALONE),
    ],
    ids=[
        "full",
        "caps",
        "lora",
        "sample_weight",
        "eagerly",
        "lora of the embedding",
        "lora on int8",
    ],
)
def test_one_step_equals_one_by_the_plain_loss(monkeypatch, options):
    """A learning rate of 1 changes weights by their gradients: of embedding, norms, projections, LoRA."""
    expected_weights, expected_logs = trained(False, **options)
    for chunk_size in (None, 7):
        if chunk_size:
            monkeypatch.setattr(loss, "CHUNK_LOGITS", 128 * chunk_size)
        weights, logs = trained(True, **options)
        assert len(weights) == len(expected_weights) > 2
        for value, expected in zip(weights, expected_weights, strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
        assert logs.keys() == expected_logs.keys() == {"loss", "sparse_categorical_accuracy"}
        for name in logs:
            np.testing.assert_allclose(logs[name], expected_logs[name], rtol=1e-5, atol=1e-6)


def test_mixed_precision():
    """Both losses round to 8 bits, at different points."""
    weights, logs = trained(True, dtype="mixed_bfloat16")
    expected_weights, expected_logs = trained(False, dtype="mixed_bfloat16")
    start = [to_numpy(v) for v in random_weights("mixed_bfloat16")]
    for value, expected, before in zip(weights, expected_weights, start, strict=True):
        assert np.abs(value - expected).max() <= 0.03 * np.abs(expected - before).max()
    np.testing.assert_allclose(logs["loss"], expected_logs["loss"], rtol=1e-2)


def random_weights(dtype):
    keras.utils.set_random_seed(0)
    return random_backbone(num_layers=1, dtype=dtype).trainable_variables


@pytest.mark.first_backend
def test_gradient_checkpointing_changes_no_result():
    two_layers = dict(num_layers=2)
    weights, logs = trained(True, two_layers, gradient_checkpointing=True)
    expected_weights, expected_logs = trained(True, two_layers)
    for value, expected in zip(weights, expected_weights, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(logs["loss"], expected_logs["loss"], rtol=1e-6)


@pytest.mark.first_backend
def test_fit_evaluate_and_score_do_not_call_the_head(model, monkeypatch):
    def call(self, x, reverse=False):
        assert not reverse, "logits of all tokens"
        return keras.layers.Embedding.call(self, x)

    monkeypatch.setattr(ReversibleEmbedding, "call", call)
    sizes = []
    logits = LogitTerm.logits
    monkeypatch.setattr(
        LogitTerm, "logits", lambda self: sizes.append(self.rows.shape[0]) or logits(self)
    )
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 128 * 5)
    x = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
    model.compile(keras.optimizers.SGD(0.1))
    model.fit(x, IDS, batch_size=4, verbose=0)
    model.evaluate(x, IDS, batch_size=4, verbose=0)
    model.score(IDS)
    assert len(sizes) >= 3 and set(sizes) == {5}


@pytest.mark.first_backend
def test_metrics_of_the_user_get_logits(model):
    x = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
    model.compile("sgd", weighted_metrics=[keras.metrics.SparseTopKCategoricalAccuracy(128)])
    assert (
        model.evaluate(x, IDS, verbose=0, return_dict=True)["sparse_top_k_categorical_accuracy"]
        == 1
    )
    model.compile("sgd", weighted_metrics=None)
    assert set(model.evaluate(x, IDS, verbose=0, return_dict=True)) == {"loss"}


@pytest.mark.parametrize("rows", [32, 2**14])
def test_gradient_of_an_int8_table(monkeypatch, rows):
    """It is that of a table in floating point whose rows were not rounded."""
    monkeypatch.setattr(logit_term, "INT8_BLOCK_ROWS", rows)
    scale = 127 / np.abs(TABLE).max(1)
    term = LogitTerm(ROWS, np.round(TABLE * scale[:, None]).astype("int8"), scale.astype("float32"))
    upstream = np.random.default_rng(3).normal(size=(N, V)).astype("float32")
    row_gradient, table_gradient = term._replace(table=ops.convert_to_tensor(term.table)).gradients(
        upstream
    )
    np.testing.assert_allclose(
        to_numpy(row_gradient), upstream @ (term.table / scale[:, None]), rtol=1e-4, atol=1e-4
    )
    assert table_gradient is None


@pytest.mark.parametrize("rounds_rows", [True, False])
def test_gradients_with_an_int8_table_are_straight_through(rounds_rows):
    """The logits are those of rounded rows, their gradient is that of the rows; with an adapter, too."""
    quantizer = keras.quantizers.AbsMaxQuantizer(axis=-1) if rounds_rows else None
    scale = (127 / np.abs(TABLE).max(1)).astype("float32")
    table = ops.convert_to_tensor(np.round(TABLE * scale[:, None]).astype("int8"))
    rows, more_rows, more_table = (keras.Variable(x) for x in (ROWS, MORE_ROWS, MORE_TABLE))

    def chunked():
        first = LogitTerm(rows.value, table, ops.convert_to_tensor(scale), quantizer)
        terms = [first, LogitTerm(more_rows.value, more_table.value, is_trained=True)]
        return loss.cross_entropy(terms, TARGETS, WEIGHTS, 5.0, chunk_size=7)[0]

    def plainly():
        smooth = ops.matmul(rows.value, ops.transpose(ops.cast(table, "float32") / scale[:, None]))
        logits = smooth
        if rounds_rows:
            rounded = np.round(ROWS * 127 / np.abs(ROWS).max(1, keepdims=True)).clip(-127, 127)
            rounded = rounded * np.abs(ROWS).max(1, keepdims=True) / 127
            rough = rounded @ (to_numpy(table).astype("float32") / scale[:, None]).T
            logits = logits + (
                ops.convert_to_tensor(rough.astype("float32")) - ops.stop_gradient(smooth)
            )
        logits = logits + ops.matmul(more_rows.value, ops.transpose(more_table.value))
        log_p = ops.log_softmax(5.0 * ops.tanh(logits / 5.0), axis=-1)
        return -ops.dot(ops.take_along_axis(log_p, TARGETS[:, None], axis=1)[:, 0], WEIGHTS)

    totals = [to_numpy(ops.stop_gradient(total())) for total in (chunked, plainly)]
    np.testing.assert_allclose(*totals, rtol=1e-5)
    found, expected = (
        gradients(total, [rows, more_rows, more_table]) for total in (chunked, plainly)
    )
    for one, other in zip(found, expected, strict=True):
        assert np.abs(other).max() > 0.1
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.first_backend
@pytest.mark.parametrize("config", [None, WEIGHTS_ALONE], ids=["int8", "weights_alone"])
def test_int8_model_fits_its_adapter(config):
    keras.utils.set_random_seed(0)
    model = VaultGemmaCausalLM(random_backbone(num_layers=1))
    model.quantize("int8", config=config)
    model.backbone.enable_lora(4)
    model.compile(keras.optimizers.Adam(0.01))
    x = {"token_ids": IDS[:, :-1], "padding_mask": np.ones_like(IDS[:, 1:])}
    losses = model.fit(x, IDS[:, 1:], epochs=30, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    "config",
    [None, pytest.param(WEIGHTS_ALONE, marks=pytest.mark.first_backend)],
    ids=["int8", "weights_alone"],
)
def test_the_int8_loss_is_that_of_the_int8_logits(model, config):
    model.quantize("int8", config=config)
    log_p = to_numpy(ops.log_softmax(model.score(IDS, scoring_mode="logits"), axis=-1))
    expected = -np.take_along_axis(log_p[:, :-1], IDS[:, 1:, None], axis=2)[..., 0]
    np.testing.assert_allclose(model.score(IDS)[:, :-1], expected, rtol=1e-5, atol=1e-5)


def test_no_array_holds_all_logits():
    def total(rows, table):
        return loss.cross_entropy(
            [LogitTerm(rows, table, is_trained=True)], TARGETS, WEIGHTS, 5.0, True, 4
        )[0]

    shapes = shapes_made(total, ROWS, TABLE)
    assert (4, V) in shapes
    # 37 tokens are 40 in chunks of 4.
    assert not {(N, V), (V, N), (40, V), (V, 40)} & shapes


@pytest.mark.skipif(backend.NAME != "tensorflow", reason="other backends know all shapes")
def test_a_chunk_has_no_more_tokens_than_a_batch_of_unknown_size(monkeypatch):
    """`fit` compiles for any batch size if the last batch is smaller than the others."""
    import tensorflow as tf

    sizes, logits = [], LogitTerm.logits

    def count(self):
        tf.numpy_function(lambda rows: sizes.append(len(rows)), [self.rows], [])
        return logits(self)

    monkeypatch.setattr(LogitTerm, "logits", count)

    @tf.function(input_signature=[tf.TensorSpec((None, D)), tf.TensorSpec((None,), tf.int32)])
    def losses(rows, targets):
        terms = [LogitTerm(rows, TABLE, is_trained=True)]
        return loss.cross_entropy(terms, targets, ops.ones_like(targets), chunk_size=30)[1]

    for count_of_rows, expected in ((N, [19, 19]), (7, [7]), (1, [1]), (0, [])):
        sizes.clear()
        found = losses(ROWS[:count_of_rows], TARGETS[:count_of_rows])
        probabilities = np.exp(ROWS @ TABLE.T)
        probabilities /= probabilities.sum(1, keepdims=True)
        plainly = -np.log(probabilities[np.arange(N), TARGETS])[:count_of_rows]
        np.testing.assert_allclose(to_numpy(found), plainly, rtol=1e-5, atol=1e-5)
        assert sizes == expected


@pytest.mark.skipif(backend.NAME == "torch", reason="PyTorch has no compiler that could undo it")
def test_the_compiled_function_recomputes():
    """A compiler that eliminates the recomputation as a common subexpression saves no memory."""

    def products(gradient_checkpointing):
        keras.utils.set_random_seed(0)
        backbone = random_backbone(num_layers=1)
        backbone.gradient_checkpointing = gradient_checkpointing
        variables = backbone.trainable_variables

        def total(*values):
            with keras.StatelessScope(state_mapping=zip(variables, values, strict=True)):
                return ops.sum(backbone({"token_ids": IDS, "padding_mask": np.ones_like(IDS)}))

        return len(re.findall(r"= \S+ dot\(", optimized(total, [to_numpy(v) for v in variables])))

    # The seven projections of the layer.
    assert products(True) >= products(False) + 7


def optimized(total, arrays):
    """Return the HLO that XLA compiles for the gradients of a scalar."""
    if backend.NAME == "jax":
        import jax

        return (
            jax.jit(jax.grad(total, argnums=tuple(range(len(arrays)))))
            .lower(*arrays)
            .compile()
            .as_text()
        )
    import tensorflow as tf

    @tf.function(jit_compile=True)
    def gradient(*tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            value = total(*tensors)
        return tape.gradient(value, tensors)

    return gradient.experimental_get_compiler_ir(*map(tf.constant, arrays))(stage="optimized_hlo")


def test_gradient_checkpointing_draws_dropout_once():
    """The recomputation drops the same positions."""

    def losses(gradient_checkpointing):
        keras.utils.set_random_seed(0)
        model = VaultGemmaCausalLM(random_backbone())
        model.backbone.enable_lora(4, dropout=0.5)
        model.compile(keras.optimizers.SGD(1.0), gradient_checkpointing=gradient_checkpointing)
        x = {"token_ids": IDS[:, :-1], "padding_mask": np.ones_like(IDS[:, 1:])}
        return model.fit(x, IDS[:, 1:], epochs=3, verbose=0, shuffle=False).history["loss"]

    np.testing.assert_allclose(losses(True), losses(False), rtol=1e-5)
