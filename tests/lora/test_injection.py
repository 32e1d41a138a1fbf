import numpy as np
import pytest
from common import random_backbone, to_numpy
from keras.distribution import DeviceMesh, LayoutMap, ModelParallel

from keras_vaultgemma import backend
from keras_vaultgemma.lora import injection
from keras_vaultgemma.lora.peft_format import Adapter


@pytest.fixture(scope="module")
def backbone():
    return random_backbone(num_layers=2)


def test_every_matrix_accepts_an_adapter(backbone):
    paths = [
        f"{path}/weight".replace("token_embedding/weight", "token_embedding/embeddings")
        for path in injection.adaptable_layers(backbone)
    ]
    assert paths == [variable.path for variable in backbone.variables if len(variable.shape) == 2]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["query"], ["decoder_block_0/attention/query", "decoder_block_1/attention/query"]),
        ("down", ["decoder_block_0/down", "decoder_block_1/down"]),
        (["token_embedding", r".*_1/up"], ["token_embedding", "decoder_block_1/up"]),
        (
            [r"decoder_block_0/attention/.*"],
            [
                f"decoder_block_0/attention/{name}"
                for name in ("query", "key", "value", "attention_output")
            ],
        ),
        (
            [r".*_0/(gate|up)", "gate"],
            ["decoder_block_0/gate", "decoder_block_0/up", "decoder_block_1/gate"],
        ),
    ],
)
def test_targets_select_layers(backbone, targets, expected):
    assert injection.match_targets(backbone, targets) == expected


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["query", "q_proj"], "must be one of .*'token_embedding', 'query'.*Received: 'q_proj'"),
        (["attention"], "Received: 'attention'"),
        (
            ["decoder_block_7/.*"],
            "match a path such as decoder_block_0/attention/query. Received: 'decoder_block_7",
        ),
        ([r"query("], r"a name or a regular expression. Received: 'query\('"),
        ([3], "a name or a regular expression. Received: 3"),
        ([], "must name a layer"),
    ],
)
def test_unsupported_targets_raise(backbone, targets, message):
    with pytest.raises(ValueError, match=message):
        injection.match_targets(backbone, targets)


def test_factors_are_written_and_read_bit_for_bit():
    backbone = random_backbone(num_layers=1)
    random = np.random.default_rng(0)
    layers = injection.adaptable_layers(backbone)
    factors = {
        path: (
            random.normal(size=(48, 5)).astype("float32"),
            random.normal(size=(5, width)).astype("float32"),
        )
        for path, width in (("decoder_block_0/attention/key", 64), ("decoder_block_0/gate", 96))
    }
    injection.create_factors(backbone, Adapter(5, 2.5, 0.25, factors))
    assert [v.path for v in backbone.trainable_variables] == [
        f"{path}/lora_kernel_{x}" for path in factors for x in "ab"
    ]
    assert (
        layers["decoder_block_0/gate"].lora_scale,
        layers["decoder_block_0/gate"].lora_dropout,
    ) == (0.5, 0.25)
    new = {path: (a + 1, b * 2) for path, (a, b) in factors.items()}
    for values in (factors, new):
        injection.assign_factors(backbone, Adapter(5, 2.5, 0.25, values))
        read = injection.read_factors(backbone, Adapter(5, 2.5, 0.25, dict.fromkeys(factors)))
        for path, pair in values.items():
            assert all(
                np.array_equal(one, other)
                for one, other in zip(read.factors[path], pair, strict=True)
            )
    injection.assign_factors(backbone, Adapter(5, 2.5, 0.25, factors))
    assert np.array_equal(
        read.factors["decoder_block_0/gate"][0], new["decoder_block_0/gate"][0]
    )  # a copy
    base = to_numpy(layers["decoder_block_0/gate"].weights[0]).T
    merged = injection.saved_values(layers["decoder_block_0/gate"])
    a, b = factors["decoder_block_0/gate"]
    np.testing.assert_allclose(merged["0"], base + 0.5 * a @ b, rtol=1e-5, atol=1e-5)
    injection.remove_factors(backbone)
    assert backbone.trainable_variables == [] and not any(
        "lora" in v.path for v in backbone.variables
    )


@pytest.mark.skipif(backend.NAME != "jax", reason="Keras distributes models on JAX only")
def test_each_device_gets_its_part_of_a_factor(monkeypatch):
    """Keras must not distribute factors in a compiled function, where a large factor is a constant."""
    layouts, from_numpy = [], backend.from_numpy
    monkeypatch.setattr(
        backend,
        "from_numpy",
        lambda array, layout=None: layouts.append(layout) or from_numpy(array, layout),
    )
    map_of = LayoutMap(DeviceMesh((1, 1), ("batch", "model"), ["cpu:0"]))
    map_of["decoder_block_0/gate/lora_kernel_b"] = (None, "model")
    factors = {
        "decoder_block_0/gate": (np.ones((48, 2), "float32"), np.full((2, 96), 3, "float32"))
    }
    with ModelParallel(layout_map=map_of, auto_shard_dataset=False).scope():
        backbone = random_backbone(num_layers=1)
        injection.create_factors(backbone, Adapter(2, 2.0, 0.0, factors))
    assert [tuple(layout.spec) for layout in layouts] == [(None, None), (None, "model")]
    found = injection.adaptable_layers(backbone)["decoder_block_0/gate"].lora_factors
    assert all(
        np.array_equal(to_numpy(x), y)
        for x, y in zip(found, factors["decoder_block_0/gate"], strict=True)
    )
