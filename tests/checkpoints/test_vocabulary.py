"""Vocabularies of Hugging Face folders, against transformers and the SentencePiece model they come from."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from hard_texts import HARD
from hub_client import write_checkpoint
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from keras_vaultgemma import VaultGemmaCausalLMPreprocessor, VaultGemmaTokenizer
from keras_vaultgemma.checkpoints import presets
from keras_vaultgemma.checkpoints.sentencepiece_format import (
    BYTE,
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    read_pieces,
    with_pieces,
    write_model,
)
from keras_vaultgemma.checkpoints.vocabulary import read_vocabulary

pytestmark = pytest.mark.any_backend

TINY = Path(__file__).parents[2] / "presets/vaultgemma_tiny/assets/tokenizer/vocabulary.spm"
GENUINE = os.environ.get("GEMMA_VOCABULARY")
EDGES = ("\t", "\n", " ", "  ", "<", ">", "▁", "0", "the", "é", "𒀀", "<eos>", "<end_of_turn>")


def held_out(count, seed=0):
    """Random texts: words of Unicode's planes, runs of spaces and lines, pieces of marks, digits and bytes."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 12)):
            kind = rng.randrange(6)
            if kind == 0:
                parts.append(rng.choice(" \n\t") * rng.randint(1, 40))
            elif kind == 1:
                parts.append("".join(chr(rng.randint(32, 0x24F)) for _ in range(8)))
            elif kind == 2:
                parts.append("".join(chr(rng.randint(0x250, 0xD7FF)) for _ in range(4)))
            elif kind == 3:
                parts.append("".join(chr(rng.randint(0xE000, 0x10FFFF)) for _ in range(3)))
            elif kind == 4:
                parts.append(rng.choice(EDGES) * rng.randint(1, 3))
            else:
                parts.append("".join(rng.choice("etaoin shrdlu") for _ in range(20)))
        texts.append("".join(parts))
    return [text.replace("▁", "_") for text in texts]


def ids(model, texts):
    return SentencePieceProcessor(model_proto=model).encode(texts)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The bundled vocabulary as transformers 5 saves it: tokenizer.json and no SentencePiece model."""
    root = tmp_path_factory.mktemp("theirs")
    shutil.copy(TINY, root / "tokenizer.model")
    (root / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer"}')
    (root / "config.json").write_text('{"model_type": "vaultgemma"}')
    tokenizer = transformers.AutoTokenizer.from_pretrained(root)
    folder = write_checkpoint(root / "saved", 0)
    tokenizer.save_pretrained(folder)
    assert not list(folder.glob("*.model")) and (folder / "tokenizer.json").is_file()
    return folder


@pytest.fixture
def folder(theirs, tmp_path):
    return shutil.copytree(theirs, tmp_path / "folder")


def edit_json(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_a_tokenizer_json_gives_the_ids_of_its_sentencepiece_model(theirs):
    texts = HARD + held_out(500)
    assert ids(read_vocabulary(theirs), texts) == ids(TINY.read_bytes(), texts)


def test_a_tokenizer_json_gives_the_ids_of_transformers(theirs):
    tokenizer = transformers.AutoTokenizer.from_pretrained(theirs)
    # A control token in text is a token for transformers and text for this package. Of more than 31
    # spaces transformers makes other runs than the SentencePiece model that it has read.
    texts = [text for text in HARD + held_out(300, 1) if not {*"<>"} & {*text}]
    texts = [text for text in texts if " " * 32 not in text]
    assert len(texts) > 150
    ours = ids(read_vocabulary(theirs), texts)
    assert ours == tokenizer(texts, add_special_tokens=False).input_ids


def test_the_tokenizer_loads_and_decodes(theirs):
    tokenizer = VaultGemmaTokenizer.from_preset(theirs)
    assert (tokenizer.start_token_id, tokenizer.end_token_id, tokenizer.pad_token_id) == (2, 1, 0)
    assert tokenizer.end_of_turn_id == 107 and tokenizer.vocabulary_size() == 4096
    for text in HARD[2:]:
        assert tokenizer.detokenize([int(i) for i in tokenizer(text)]) == text


def test_types_of_pieces_are_those_of_the_sentencepiece_model(theirs):
    rebuilt, original = read_pieces(read_vocabulary(theirs)), read_pieces(TINY.read_bytes())
    assert [(p.text, p.kind) for p in rebuilt] == [(p.text, p.kind) for p in original]


def test_the_strings_of_older_merges(folder):
    before = read_vocabulary(folder)

    def as_strings(content):
        model = content["model"]
        model["merges"] = [" ".join(merge) for merge in model["merges"]]

    edit_json(folder / "tokenizer.json", as_strings)
    assert read_vocabulary(folder) == before


def set_model(**values):
    return lambda content: content["model"].update(values)


def drop_a_pair(content):
    """Drop one of the pairs that make a token."""
    content["model"]["merges"].remove(["\u2581t", "h"])


@pytest.mark.parametrize(
    "change, message",
    [
        (set_model(type="Unigram"), "`model` must be of the type 'BPE'"),
        (set_model(ignore_merges=True), "`model.ignore_merges` must not be set"),
        (set_model(vocab=None), "`model` must have a `vocab` and `merges`"),
        (lambda c: c["model"]["vocab"].update(new=9999), "the ids of `vocab` must be 0, 1, 2"),
        (lambda c: c["model"]["vocab"].pop("<bos>"), "it has no <bos>"),
        (drop_a_pair, "`merges` must have every pair"),
        (lambda c: c["model"]["merges"].append(3), "`merges` must be pairs. Received: 3"),
        (lambda c: c.update(normalizer={"type": "NFC"}), "`normalizer` must replace ' ' by '▁'"),
        (lambda c: c.update(pre_tokenizer={"type": "ByteLevel"}), "`pre_tokenizer` must be null"),
        (lambda c: c.update(added_tokens=[3]), "`added_tokens` must be a list of tokens"),
    ],
)
def test_a_tokenizer_of_another_kind_is_rejected(folder, change, message):
    edit_json(folder / "tokenizer.json", change)
    with pytest.raises(ValueError, match="tokenizer.json") as error:
        VaultGemmaTokenizer.from_preset(folder)
    assert message in str(error.value)


def test_the_json_of_a_keras_preset_is_no_vocabulary():
    folder = presets.bundled()["vaultgemma_tiny"]
    assert presets.file(folder, "vocabulary").name == "vocabulary.spm"


# Added tokens


@pytest.mark.parametrize("with_model", [True, False])
def test_added_tokens_are_honoured(folder, with_model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens(["Rumpelstilzchen", "two words"])
    tokenizer.save_pretrained(folder)
    if with_model:
        shutil.copy(TINY, folder / "tokenizer.model")
    ours = VaultGemmaTokenizer.from_preset(folder)
    assert ours.vocabulary_size() == len(tokenizer) == 4099
    text = "Ein Rumpelstilzchen<|im_start|>Rumpelstilzchens two words, two  words"
    found = [int(i) for i in ours(text)]
    assert found == tokenizer(text, add_special_tokens=False).input_ids
    assert {4096, 4097, 4098} < {*found}
    assert ours.detokenize(found) == text


def test_added_tokens_of_older_folders(folder):
    (folder / "tokenizer.json").unlink()
    shutil.copy(TINY, folder / "tokenizer.model")
    (folder / "added_tokens.json").write_text('{"<|a|>": 4096, "<|b|>": 4097}')
    decoder = {"4098": {"content": "<|c|>", "special": True}, "50": {"content": "<renamed>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    tokenizer = VaultGemmaTokenizer.from_preset(folder)
    assert [int(i) for i in tokenizer("<|c|><|b|><|a|><renamed>")] == [4098, 4097, 4096, 50]


@pytest.mark.parametrize(
    "token, message",
    [
        ({"id": 5000, "content": "<far>"}, "'<far>' has the id 5000, and ids below it"),
        ({"id": 4096, "content": "<left>", "lstrip": True}, "'<left>' has `lstrip`"),
        ({"id": 4096, "content": "<word>", "single_word": True}, "'<word>' has `single_word`"),
        ({"id": 2, "content": "<s>"}, "'<s>' replaces <bos>"),
        ({"id": 4096, "content": "<eos>"}, "'<eos>' has the ids 1 and 4096"),
        ({"id": "x", "content": "<y>"}, "an added token must have an id and a text"),
    ],
)
def test_an_added_token_is_rejected_by_name(folder, token, message):
    shutil.copy(TINY, folder / "tokenizer.model")
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [token]}))
    with pytest.raises(ValueError) as error:
        VaultGemmaTokenizer.from_preset(folder)
    assert message in str(error.value) and str(folder) in str(error.value)


def test_a_mask_without_embedding_is_left_out(folder):
    """transformers adds it to every Gemma tokenizer, and not to the model."""
    edit_json(folder / "config.json", lambda config: config.update(vocab_size=4096))
    mask = {"id": 4096, "content": "<mask>"}
    edit_json(folder / "tokenizer.json", lambda content: content["added_tokens"].append(mask))
    edit_json(folder / "tokenizer.json", lambda c: c["model"]["vocab"].pop("<mask>", None))
    shutil.copy(TINY, folder / "tokenizer.model")
    assert len(read_pieces(read_vocabulary(folder))) == 4096


def test_two_vocabularies_that_disagree_raise(folder):
    """transformers reads tokenizer.json, so no text may get other ids here."""
    shutil.copy(TINY, folder / "tokenizer.model")
    before = read_vocabulary(folder)
    assert before == TINY.read_bytes()

    def swap(content):
        vocabulary = content["model"]["vocab"]
        vocabulary["▁the"], vocabulary["▁and"] = vocabulary["▁and"], vocabulary["▁the"]

    edit_json(folder / "tokenizer.json", swap)
    with pytest.raises(ValueError, match=r"tokenizer\.model must have the ids of tokenizer\.json"):
        VaultGemmaTokenizer.from_preset(folder)


# Files


def test_a_vocabulary_that_links_out_of_the_folder_is_rejected(folder, tmp_path):
    (tmp_path / "secret").write_bytes(TINY.read_bytes())
    (folder / "tokenizer.model").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"tokenizer\.model must not be a link that leaves"):
        VaultGemmaTokenizer.from_preset(folder)


@pytest.mark.parametrize("name", ["assets", "assets/tokenizer/vocabulary.spm", "tokenizer.json"])
def test_links_of_a_keras_preset_are_checked_too(tmp_path, name):
    preset = shutil.copytree(presets.bundled()["vaultgemma_tiny"], tmp_path / "preset")
    (preset / name).rename(tmp_path / "secret")
    (preset / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="must not be a link that leaves its folder"):
        VaultGemmaTokenizer.from_preset(preset)


@pytest.mark.parametrize("content", [b"", b"\0" * 9, b"version https://git-lfs\n", b"\x0a\xff\xff"])
def test_a_damaged_vocabulary_is_named(folder, content):
    (folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.model is damaged: it is no SentencePiece"):
        VaultGemmaTokenizer.from_preset(folder)


@pytest.mark.parametrize("form", ["hugging_face", "keras"])
def test_a_vocabulary_that_sentencepiece_rejects_is_named(folder, tmp_path, form):
    path = folder / "tokenizer.model"
    if form == "keras":
        folder = shutil.copytree(presets.bundled()["vaultgemma_tiny"], tmp_path / "preset")
        path = folder / "assets/tokenizer/vocabulary.spm"
    else:
        (folder / "tokenizer.json").unlink()
    path.write_bytes(write_model([Piece("a"), Piece("a")]))
    for load in (VaultGemmaTokenizer.from_preset, VaultGemmaCausalLMPreprocessor.from_preset):
        with pytest.raises(ValueError, match="is damaged: it is no SentencePiece model") as error:
            load(folder)
        assert str(path) in str(error.value)


# The format


def test_protobuf_reads_the_same_model():
    pieces = [
        Piece("<pad>", kind=CONTROL),
        Piece("<eos>", kind=CONTROL),
        Piece("<bos>", kind=CONTROL),
        Piece("<unk>", kind=UNKNOWN),
        *(Piece(f"<0x{i:02X}>", kind=BYTE) for i in range(256)),
        Piece("<turn>", kind=USER_DEFINED),
        Piece("ab", -1.5),
        Piece("🙂" * 50, -300.0),
    ]
    model = write_model(pieces)
    theirs = sentencepiece_model_pb2.ModelProto.FromString(model)
    assert [(p.piece, p.score, p.type) for p in theirs.pieces] == pieces == read_pieces(model)
    assert theirs.trainer_spec.model_type == theirs.trainer_spec.BPE
    assert theirs.trainer_spec.byte_fallback and theirs.trainer_spec.vocab_size == len(pieces)
    normalizer = theirs.normalizer_spec
    assert normalizer.name == "identity" and normalizer.escape_whitespaces
    assert not normalizer.add_dummy_prefix and not normalizer.remove_extra_whitespaces
    changed = with_pieces(model, {4: Piece("x"), len(pieces): Piece("new", kind=USER_DEFINED)})
    expected = [*pieces[:4], Piece("x"), *pieces[5:], Piece("new", kind=USER_DEFINED)]
    theirs = sentencepiece_model_pb2.ModelProto.FromString(changed)
    assert [(p.piece, p.score, p.type) for p in theirs.pieces] == expected == read_pieces(changed)
    assert theirs.normalizer_spec == normalizer


def test_the_bundled_model_is_read_as_protobuf_reads_it():
    theirs = sentencepiece_model_pb2.ModelProto.FromString(TINY.read_bytes())
    ours = read_pieces(TINY.read_bytes())
    assert [(p.piece, p.score, p.type) for p in theirs.pieces] == ours
    assert with_pieces(TINY.read_bytes(), {}) == TINY.read_bytes()


@pytest.mark.skipif(
    not GENUINE,
    reason="GEMMA_VOCABULARY names no file: the genuine vocabulary is Google's, not ours",
)
def test_the_genuine_vocabulary_survives_transformers(tmp_path):
    folder = write_checkpoint(tmp_path / "saved", 0)
    code = (
        "import sys, shutil, transformers\n"
        "tokenizer = transformers.GemmaTokenizer.from_pretrained(sys.argv[1])\n"
        "tokenizer.save_pretrained(sys.argv[2])"
    )
    (tmp_path / "source").mkdir()
    shutil.copy(GENUINE, tmp_path / "source/tokenizer.model")
    config = {"tokenizer_class": "GemmaTokenizer"}
    (tmp_path / "source/tokenizer_config.json").write_text(json.dumps(config))
    subprocess.run([sys.executable, "-c", code, tmp_path / "source", folder], check=True)
    texts = HARD + held_out(500, 2)
    assert ids(read_vocabulary(folder), texts) == ids(Path(GENUINE).read_bytes(), texts)
