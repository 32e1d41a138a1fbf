"""Equal to transformers' VaultGemma on checkpoints it wrote, and to itself on every backend."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import reference
import transformers
from common import to_numpy

from keras_vaultgemma import VaultGemmaCausalLM, backend

BASE = dict(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=32,
    query_pre_attn_scalar=32,
    max_position_embeddings=128,
    layer_types=["full_attention"] * 2,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
)
CONFIGURATIONS = {
    "release-like": {},
    "class defaults scaled down": dict(
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        query_pre_attn_scalar=16,
        layer_types=None,
        sliding_window=8,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
    "one key-value head": dict(num_key_value_heads=1),
    # A small scalar makes scores large. At 0.25, float32 fails the bar: transformers is 8e-5 off float64's logits, this
    # model 5e-5, and the two are 1.3e-4 apart.
    "query scalar unlike head_dim": dict(query_pre_attn_scalar=7, initializer_range=0.15),
    "attention cap alone": dict(attn_logit_softcapping=2.0),
    "final cap alone": dict(final_logit_softcapping=3.0),
    "caps and short window in all layers": dict(
        layer_types=["sliding_attention"] * 2,
        sliding_window=3,
        num_key_value_heads=2,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0,
    ),
    "other theta and epsilon": dict(
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rms_norm_eps=1e-3
    ),
    "everything unlike at once": dict(
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        query_pre_attn_scalar=7,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        sliding_window=5,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=9.0,
        rope_parameters={"rope_type": "default", "rope_theta": 777.0},
        rms_norm_eps=1e-5,
    ),
}
PROMPTS = [[2, 17, 5, 99, 250, 31, 8], [2, 4], [2, *range(40, 75)], [9]]


ALL_AT_ONCE = pytest.param("everything unlike at once", marks=pytest.mark.long)


@pytest.fixture(scope="module", params=[*list(CONFIGURATIONS)[:-1], ALL_AT_ONCE])
def pair(request, tmp_path_factory):
    """(transformers' model, this package's model) of one checkpoint."""
    import torch

    torch.manual_seed(0)
    # Large enough that attention is far from uniform, both caps bite and logits differ by whole units.
    config = transformers.VaultGemmaConfig(
        **{**BASE, "initializer_range": 0.25, **CONFIGURATIONS[request.param]}
    )
    theirs = transformers.VaultGemmaForCausalLM(config).eval()
    for name, parameter in theirs.named_parameters():
        if "norm" in name:  # written as zeros
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("checkpoint")
    theirs.save_pretrained(folder)
    return theirs, VaultGemmaCausalLM.from_preset(folder, preprocessor=None)


def their_logits(theirs, row):
    import torch

    with torch.no_grad():
        return theirs(torch.tensor([row])).logits[0].numpy()


def our_logits(ours, rows):
    """Logits of rows that are padded to one length, without those of the padding."""
    mask = np.arange(max(map(len, rows))) < np.array([len(row) for row in rows])[:, None]
    ids = np.zeros(mask.shape, "int32")
    ids[mask] = np.concatenate(rows)
    logits = to_numpy(ours({"token_ids": ids, "padding_mask": mask.astype("int32")}))
    return [logits[i, : len(row)] for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def found(pair):
    return our_logits(pair[1], PROMPTS)


def test_logits_equal_transformers(pair, found):
    for row, logits in zip(PROMPTS, found, strict=True):
        expected = their_logits(pair[0], row)
        assert np.abs(logits - expected).max() <= 1e-4
    assert expected.std() > 0.5


def test_caps_and_windows_matter_in_these_configurations(pair):
    """A parity test of a cap that never bites would prove nothing."""
    _, ours = pair
    backbone = ours.backbone
    row = PROMPTS[2]
    before = reference.logits(backbone, row)
    for name, value in (
        ("attention_logit_soft_cap", None),
        ("final_logit_soft_cap", None),
        ("sliding_window_size", 99),
    ):
        old = getattr(backbone, name)
        matters = old is not None and (
            name != "sliding_window_size" or "sliding_attention" in backbone.layer_types
        )
        if matters:
            setattr(backbone, name, value)
            assert np.abs(reference.logits(backbone, row) - before).max() > 1e-2, name
            setattr(backbone, name, old)


@pytest.mark.first_backend
def test_greedy_ids_equal_transformers(pair):
    import torch

    theirs, ours = pair
    expected = []
    for row in PROMPTS:
        ids = theirs.generate(
            torch.tensor([row]),
            max_new_tokens=48,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected.append(ids[0, len(row) :].tolist())
    together = ours.generate(PROMPTS, max_new_tokens=48, stop_token_ids=None, strip_prompt=True)
    assert together == expected
    assert (
        ours.generate(PROMPTS[0], max_new_tokens=48, stop_token_ids=None, strip_prompt=True)
        == expected[0]
    )


def test_logits_equal_the_reference(pair, found):
    for row, logits in zip(PROMPTS, found, strict=True):
        assert np.abs(logits - reference.logits(pair[1].backbone, row)).max() <= 1e-4


@pytest.mark.long
def test_backends_agree_on_the_tiny_preset(tiny, tmp_path):
    """To `allclose(rtol=1e-5, atol=1e-5)`, each two. An absolute 1e-5 alone would be 10 units in the last place of these
    logits of up to 15: the float32 product in the head is off by 6e-6 of float64's, whichever library computes it."""
    if backend.NAME != "jax":
        pytest.skip("compared once, from JAX")
    text = "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do."
    rows = tiny.preprocessor.tokenize_prompts([text])
    code = (
        "import sys, numpy as np, keras, keras_vaultgemma\n"
        "model = keras_vaultgemma.VaultGemmaCausalLM.from_preset('vaultgemma_tiny')\n"
        f"logits = model({{'token_ids': np.array({rows}), 'padding_mask': np.ones((1, {len(rows[0])}), 'int32')}})\n"
        "np.save(sys.argv[1], keras.ops.convert_to_numpy(logits)[0])\n"
    )
    found = {"jax": our_logits(tiny, rows)[0]}
    for name in ("torch", "tensorflow"):
        path = tmp_path / f"{name}.npy"
        subprocess.run(
            [sys.executable, "-c", code, path],
            env={**os.environ, "KERAS_BACKEND": name},
            check=True,
        )
        found[name] = np.load(path)
    for first, second in itertools.combinations(found, 2):
        np.testing.assert_allclose(
            found[first], found[second], rtol=1e-5, atol=1e-5, err_msg=f"{first}, {second}"
        )
