import time

import keras
import numpy as np
import pytest
import reference
from common import IDS, LINES, random_backbone, to_numpy

from keras_vaultgemma import VaultGemmaCausalLM, backend


def logits_of(model):
    return to_numpy(model(IDS))


def test_score(model):
    token_ids, mask = IDS["token_ids"], IDS["padding_mask"]
    nats = model.score(token_ids, mask)
    for i, n in enumerate((5, 3)):
        logits = reference.logits(model.backbone, token_ids[i, :n].tolist())
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = [-log_p[t, token_ids[i, t + 1]] for t in range(n - 1)]
        np.testing.assert_allclose(nats[i, : n - 1], expected, atol=1e-4)
        assert (nats[i, n - 1 :] == 0).all()
    np.testing.assert_allclose(model.score(token_ids, mask, "logits"), logits_of(model), atol=1e-5)
    targets = np.full_like(token_ids, 7)
    log_p = to_numpy(keras.ops.log_softmax(logits_of(model), axis=-1))
    np.testing.assert_allclose(
        model.score(token_ids, mask, target_ids=targets), -log_p[..., 7] * mask, atol=1e-4
    )
    with pytest.raises(ValueError, match="'loss' or 'logits'. Received: 'nats'"):
        model.score(token_ids, mask, "nats")
    with pytest.raises(ValueError, match="from 0 to 127. Received: 128"):
        model.score(np.array([[2, 128]]))


def test_score_of_text_is_score_of_its_ids(tiny):
    rows = tiny.preprocessor.tokenize_prompts(LINES[:1])
    np.testing.assert_array_equal(tiny.score(LINES[0]), tiny.score(np.array(rows)))


def test_padding_at_the_end_of_all_rows_costs_nothing(tiny):
    """Rows of 20 tokens in arrays of 512 columns are not computed as rows of 512 tokens."""
    rows = np.random.default_rng(0).integers(0, 1000, (32, 20))
    ids, mask = (np.pad(x, ((0, 0), (0, 492))) for x in (rows, np.ones_like(rows)))
    seconds = {}
    for name, arrays in {"short": (rows,), "padded": (ids, mask), "long": (ids,)}.items():
        tiny.score(*arrays)
        start = time.process_time()
        nats = tiny.score(*arrays)
        seconds[name] = time.process_time() - start
        if name == "padded":
            np.testing.assert_allclose(nats[:, :19], tiny.score(rows)[:, :19], atol=1e-4)
            assert nats.shape == ids.shape and not nats[:, 19:].any()
    assert seconds["padded"] < seconds["long"] / 3


def test_score_is_compiled_once_for_the_same_variables(monkeypatch):
    compiled, compile_function = [], backend.compile_function

    def count(*args, **kwargs):
        compiled.append(1)
        return compile_function(*args, **kwargs)

    monkeypatch.setattr(backend, "compile_function", count)
    model = VaultGemmaCausalLM(random_backbone(num_layers=1))
    before = model.score(IDS["token_ids"])
    np.testing.assert_array_equal(model.score(IDS["token_ids"]), before)
    assert len(compiled) == 1
    table = model.backbone.token_embedding.embeddings
    table.assign(to_numpy(table) * 2)
    assert np.abs(model.score(IDS["token_ids"]) - before).max() > 0.1 and len(compiled) == 1
    model.backbone.enable_lora(2)
    model.score(IDS["token_ids"])
    assert len(compiled) == 2
