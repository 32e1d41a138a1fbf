"""Embeddings with more rows than the vocabulary has pieces, and with fewer."""

import keras
import numpy as np
import pytest
import transformers
from common import one_layer_preset, random_backbone, to_numpy
from hub_client import write_checkpoint

from keras_vaultgemma import VaultGemmaCausalLM
from keras_vaultgemma.checkpoints import presets
from keras_vaultgemma.recipes.convert import convert

pytestmark = pytest.mark.first_backend

ROWS, PIECES = 4160, 4096


@pytest.fixture(scope="module")
def padded(tiny):
    """A model whose largest logits are those of ids without a piece."""
    backbone = random_backbone(num_layers=1, vocabulary_size=ROWS)
    table = np.array(to_numpy(backbone.token_embedding.embeddings))
    table[PIECES:] *= 20
    backbone.token_embedding.embeddings.assign(table)
    return VaultGemmaCausalLM(backbone, tiny.preprocessor)


@pytest.mark.every_backend
@pytest.mark.parametrize("sampler", ["greedy", "top_p", "beam", "contrastive"])
def test_ids_without_a_piece_are_never_generated(padded, sampler):
    ids = np.array([[2, 400, 500]])
    logits = to_numpy(padded({"token_ids": ids, "padding_mask": np.ones_like(ids)}))
    assert logits[0, -1].argmax() >= PIECES and np.isfinite(logits).all()
    padded.compile(sampler=sampler)
    rows = padded.generate([[2, 400, 500]], max_new_tokens=8, stop_token_ids=None)
    assert len(rows[0]) == 11 and max(map(int, rows[0])) < PIECES
    if sampler == "greedy":
        assert rows[0][3] == logits[0, -1, :PIECES].argmax()
        assert isinstance(padded.generate("Once upon", max_new_tokens=8), str)
        assert "".join(padded.stream("Once upon", max_new_tokens=4)) is not None


def test_log_probabilities_are_those_of_the_pieces(padded):
    padded.compile(sampler="greedy")
    ids = np.array([[2, 400, 500]])
    logits = to_numpy(padded({"token_ids": ids, "padding_mask": np.ones_like(ids)}))[0, -1, :PIECES]
    found = padded.generate([[2, 400, 500]], max_new_tokens=1, return_log_probs=True)
    expected = -np.log(np.exp(logits - logits.max()).sum())
    assert found.log_probs[0][0] == pytest.approx(expected, abs=1e-4)
    options = dict(max_new_tokens=8, stop_token_ids=None)
    rows = padded.generate([[2, 400, 500]], **options)
    assert padded.generate([[2, 400, 500]], prompt_lookup=True, **options) == rows


def test_without_a_vocabulary_every_id_counts(padded):
    model = VaultGemmaCausalLM(padded.backbone)
    model.compile(sampler="greedy")
    rows = model.generate([[2, 400, 500]], max_new_tokens=2, stop_token_ids=None)
    assert max(map(int, rows[0])) >= PIECES


def test_resized_embeddings_of_transformers(tmp_path):
    convert(one_layer_preset(), tmp_path / "hf", to="hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    theirs.resize_token_embeddings(pad_to_multiple_of=4100)
    theirs.save_pretrained(tmp_path / "padded")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "padded")
    ours = VaultGemmaCausalLM.from_preset(tmp_path / "padded")
    assert ours.backbone.vocabulary_size == 4100
    plain = VaultGemmaCausalLM.from_preset(one_layer_preset())
    prompt = "Once upon a time"
    assert ours.generate(prompt, max_new_tokens=8) == plain.generate(prompt, max_new_tokens=8)


def test_more_pieces_than_embeddings_raise(tiny, tmp_path):
    backbone = random_backbone(num_layers=1, vocabulary_size=4000)
    with pytest.raises(ValueError, match="must have at most 4000 pieces.*Received: 4096") as error:
        VaultGemmaCausalLM(backbone, tiny.preprocessor)
    assert tiny.preprocessor.tokenizer.id_to_token(4000) in str(error.value)
    folder = write_checkpoint(tmp_path / "folder", 0)
    vocabulary = presets.file(presets.bundled()["vaultgemma_tiny"], "vocabulary")
    (folder / "tokenizer.model").write_bytes(vocabulary.read_bytes())
    for load in (VaultGemmaCausalLM.from_preset, lambda path: convert(path, tmp_path / "new")):
        with pytest.raises(ValueError, match="must have at most 64 pieces"):
            load(folder)
    assert not (tmp_path / "new").exists()


def test_a_padded_model_survives_keras(padded, tmp_path):
    padded.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    rows = loaded.generate([[2, 400, 500]], max_new_tokens=2, stop_token_ids=None)
    assert max(map(int, rows[0])) < PIECES
