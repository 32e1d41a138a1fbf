"""Train the bundled `vaultgemma_tiny` preset: vocabulary, weights and card, from two text files.

    KERAS_BACKEND=torch python tools/train_tiny_preset.py fairy_tales.txt tales.txt \\
        presets/vaultgemma_tiny --checkpoint tiny_run

Every 20th block of 40 paragraphs of the first file is held out. The vocabulary is trained on the
rest of the first file; it has Gemma's special tokens at Gemma's ids. The weights are trained on the
second file without the held-out paragraphs and without any that shares 13 words in a row with one.
No choice is made by the held-out loss. A run that was interrupted continues if the same command is
given again. Takes about 90 minutes on 2 cores with bfloat16 instructions.
"""

import argparse
import io
import json
import math
import re
from pathlib import Path

import keras
import sentencepiece

from keras_vaultgemma import (
    PackedDataset,
    TrainingCheckpoint,
    VaultGemmaBackbone,
    VaultGemmaCausalLM,
    VaultGemmaCausalLMPreprocessor,
    VaultGemmaTokenizer,
)

VOCABULARY_SIZE = 4096
SEQUENCE_LENGTH = 512
HELD_OUT_EVERY, BLOCK = 20, 40
SHARED_WORDS = 13
"""Words in a row that a paragraph shares with the held-out text if it counts as held out too."""
PREDECESSOR = (
    "The preset of this name in version 0.1.0, of 2.8 M parameters, which was trained on 3.2 MB of "
    "the same eight books as the held-out text, has 1.441 on the same bytes."
)
TAGS = "table caption thead tbody tfoot tr th td h1 h2 h3 h4 h5 h6 blockquote strong em b i u s sub"
TAGS = [*TAGS.split(), "sup", "code"]


def paragraphs_of(text):
    """Return the paragraphs of a text, each with the line breaks after it."""
    return re.findall(r"(?:[^\n]|\n(?!\n))+\n*", text)


def split(text):
    """Split into training and held-out paragraphs, each with the line breaks after it."""
    paragraphs = paragraphs_of(text)
    held_out = [(i // BLOCK) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 for i in range(len(paragraphs))]
    return (
        [p for p, held in zip(paragraphs, held_out, strict=True) if not held],
        [p for p, held in zip(paragraphs, held_out, strict=True) if held],
    )


def documents_of(paragraphs):
    """Return the stories and chapters of paragraphs, which three line breaks end."""
    return [text for text in re.split(r"\n{3,}", "".join(paragraphs)) if text.strip()]


def without(paragraphs, held_out):
    """Return the paragraphs that share neither their text nor `SHARED_WORDS` with the held-out."""

    def runs(paragraph):
        words = re.findall(r"\w+", paragraph.lower())
        ends = range(SHARED_WORDS, len(words) + 1)
        return {paragraph.strip(), *(tuple(words[end - SHARED_WORDS : end]) for end in ends)}

    known = set().union(*map(runs, held_out))
    return [p for p in paragraphs if known.isdisjoint(runs(p))]


def train_vocabulary(paragraphs, size):
    """Train a SentencePiece BPE model of `size` pieces in Gemma's layout. Return its bytes."""
    names = ["<mask>", *(f"<unused{i}>" for i in range(101)), "<start_of_turn>", "<end_of_turn>"]
    names += ["\n" * n for n in range(1, 32)] + ["\u2581" * n for n in range(2, 32)]
    names += [f"<{tag}>" for tag in TAGS] + [f"</{tag}>" for tag in TAGS]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(paragraphs),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        user_defined_symbols=names,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        # A story has few digits and no brackets; a vocabulary needs them all the same.
        character_coverage=1.0,
        required_chars="".join(map(chr, range(33, 127))),
        max_sentence_length=100_000,
        minloglevel=1,
    )
    return model.getvalue()


def packed_rows(documents, preprocessor):
    """Return `(x, y, sample_weight)` of all rows of packed documents, for `fit`."""
    (rows,) = PackedDataset(documents, preprocessor, batch_size=1_000_000)
    return rows


def bits_per_byte(model, paragraphs):
    """Return held-out bits per byte. Each token counts once, in rows of the training length."""
    documents = documents_of(paragraphs)
    x, y, weight = packed_rows(documents, model.preprocessor)
    nats = model.score(x["token_ids"], x["padding_mask"], target_ids=y)
    return float((nats * weight).sum() / math.log(2) / sum(len(d.encode()) for d in documents))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("held_out_corpus", type=Path, help="of which a part is held out")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the run")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    options = parser.parse_args()

    keras.utils.set_random_seed(0)
    first_part, held_out = split(options.held_out_corpus.read_text(encoding="utf-8"))
    training = without(paragraphs_of(options.corpus.read_text(encoding="utf-8")), held_out)
    preprocessor = VaultGemmaCausalLMPreprocessor(
        VaultGemmaTokenizer(proto=train_vocabulary(first_part, VOCABULARY_SIZE)),
        sequence_length=SEQUENCE_LENGTH,
    )
    backbone = VaultGemmaBackbone(
        vocabulary_size=VOCABULARY_SIZE,
        num_layers=4,
        num_query_heads=4,
        num_key_value_heads=4,
        hidden_dim=256,
        intermediate_dim=1152,
        head_dim=64,
        max_sequence_length=SEQUENCE_LENGTH,
        initializer_range=0.05,
        dtype="mixed_bfloat16",
        name="vaultgemma_tiny",
    )
    model = VaultGemmaCausalLM(backbone, preprocessor)
    backbone.summary()

    x, y, weight = packed_rows(documents_of(training), preprocessor)
    steps = math.ceil(len(y) / options.batch_size) * options.epochs
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps, alpha=0.01, warmup_target=options.learning_rate, warmup_steps=min(200, steps)
    )
    optimizer = keras.optimizers.AdamW(
        schedule, weight_decay=options.weight_decay, beta_2=0.98, clipnorm=1.0
    )
    optimizer.exclude_from_weight_decay(var_names=["scale"])
    model.compile(optimizer)
    model.fit(
        x,
        y,
        sample_weight=weight,
        batch_size=options.batch_size,
        epochs=options.epochs,
        validation_data=packed_rows(documents_of(held_out), preprocessor),
        callbacks=[TrainingCheckpoint(options.checkpoint, save_freq=100)],
    )

    config = {**backbone.get_config(), "dtype": "bfloat16"}
    stored = VaultGemmaBackbone.from_config(config)
    for variable, trained in zip(stored.variables, backbone.variables, strict=True):
        variable.assign(trained)
    name = "vault_gemma_causal_lm"
    VaultGemmaCausalLM(stored, preprocessor, name=name).save_to_preset(options.target)
    # What has 16 bits in the file is computed in 32, so that all backends generate the same text.
    for name in ("config.json", "task.json"):
        path = options.target / name
        write(path, path.read_text().replace('"bfloat16"', '"float32"'))
    model = VaultGemmaCausalLM.from_preset(options.target)
    bits = bits_per_byte(model, held_out)
    print(f"held-out bits per byte: {bits:.4f}")
    print(model.generate("Once upon a time", max_new_tokens=100))
    write_card(options.target, model.backbone, bits, steps, options, training, held_out)


def write_card(target, backbone, bits, steps, options, training, held_out):
    """Write metadata.json and README.md of the preset."""
    size = {
        name: sum(len(p.encode()) for p in part)
        for name, part in (("training", training), ("held_out", held_out))
    }
    optimizer = (
        f"AdamW, peak learning rate {options.learning_rate}, weight decay {options.weight_decay}"
    )
    metadata = json.loads((target / "metadata.json").read_text()) | {
        "description": "A VaultGemma of 5.6 M parameters, trained on fifty books of tales and "
        "children's novels: for tests and first steps.",
        "license": "Apache-2.0",
        "corpus": {
            "name": "tales.txt: fifty books, from Aesop, Andersen, Grimm and Lang to Nesbit, "
            "MacDonald, Alcott and Montgomery (Standard Ebooks editions and drafts)",
            "license": "CC0-1.0",
            "training_bytes": size["training"],
            "held_out_bytes": size["held_out"],
        },
        "training": {
            "steps": steps,
            "batch_size": options.batch_size,
            "sequence_length": SEQUENCE_LENGTH,
            "optimizer": optimizer,
            "dtype": "mixed_bfloat16",
        },
        "held_out_bits_per_byte": round(bits, 4),
        "privacy": None,
    }
    card = f"""# vaultgemma_tiny

{metadata["description"]} The block, the tied head and the ids of special tokens are VaultGemma's; \
the rest is small:
{backbone.count_params():,} parameters (stored in bfloat16, computed in float32), \
{backbone.num_layers} layers, width {backbone.hidden_dim}, {SEQUENCE_LENGTH} positions, \
a vocabulary of {backbone.vocabulary_size} SentencePiece pieces.

- Corpus: {metadata["corpus"]["name"]}; {metadata["corpus"]["license"]}; \
{size["training"]:,} bytes for training, {size["held_out"]:,} held out.
- Training: {steps:,} steps of {options.batch_size} x {SEQUENCE_LENGTH} tokens of packed stories, \
{options.epochs} epochs, {optimizer} (`tools/train_tiny_preset.py`).
- Held-out bits per byte: {bits:.3f}. {PREDECESSOR}
- It continues stories. It was not trained on chats, and does not answer.
- **Not privately trained**: this preset carries no differential-privacy guarantee.
- Licence of the weights: {metadata["license"]}.
"""
    write(target / "metadata.json", json.dumps(metadata, indent=4) + "\n")
    write(target / "README.md", card)


def write(path, text):
    """Write a text next to its target, and rename it."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


if __name__ == "__main__":
    main()
