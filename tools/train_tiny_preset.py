"""Train the bundled `vaultgemma_tiny` preset: vocabulary, weights and card, from one text file.

    KERAS_BACKEND=jax python tools/train_tiny_preset.py fairy_tales.txt presets/vaultgemma_tiny

Every 20th block of 40 paragraphs is held out. Vocabulary and weights are trained on the rest.
Training ends when the held-out loss has not fallen for `--patience` epochs, and the weights of
the best epoch are saved. The vocabulary has Gemma's special tokens at Gemma's ids. Each epoch
samples new segmentations (BPE-dropout, Provilkov et al., 2020, arXiv:1910.13267), because a small
corpus yields a better model that way. Takes about an hour on 2 cores.
"""

import argparse
import io
import json
import math
import re
from pathlib import Path

import keras
import numpy as np
import sentencepiece

from keras_vaultgemma import (
    VaultGemmaBackbone,
    VaultGemmaCausalLM,
    VaultGemmaCausalLMPreprocessor,
    VaultGemmaTokenizer,
)
from keras_vaultgemma.data.token_ids import pad_rows

SEQUENCE_LENGTH = 256
EOS, BOS = 1, 2
HELD_OUT_EVERY, BLOCK = 20, 40


def split(text):
    """Split into training and held-out paragraphs, each with the line breaks after it."""
    paragraphs = re.findall(r"(?:[^\n]|\n(?!\n))+\n*", text)
    held_out = [(i // BLOCK) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 for i in range(len(paragraphs))]
    return (
        [p for p, held in zip(paragraphs, held_out, strict=True) if not held],
        [p for p, held in zip(paragraphs, held_out, strict=True) if held],
    )


def train_vocabulary(paragraphs, size):
    """Train a SentencePiece BPE model of `size` pieces in Gemma's layout. Return its bytes."""
    names = ["<mask>", *(f"<unused{i}>" for i in range(101)), "<start_of_turn>", "<end_of_turn>"]
    names += ["\n" * n for n in range(1, 32)] + ["\u2581" * n for n in range(2, 32)]
    tags = [
        "table",
        "caption",
        "thead",
        "tbody",
        "tfoot",
        "tr",
        "th",
        "td",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
    ]
    tags += ["blockquote", "strong", "em", "b", "i", "u", "s", "sub", "sup", "code"]
    names += [f"<{tag}>" for tag in tags] + [f"</{tag}>" for tag in tags]
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


def rows_of(paragraphs, encode, length):
    """Return rows of at most `length` + 1 ids that start with `<bos>`. Long texts span rows.

    Three line breaks end a story or chapter: `<eos>` stands for them, and a new row starts.
    """
    rows, row = [], [BOS]
    for paragraph in paragraphs:
        ends = paragraph.endswith("\n\n\n")
        row += [*encode(paragraph.rstrip("\n")), EOS] if ends else encode(paragraph)
        while len(row) > length + 1 or (ends and len(row) > 1):
            rows.append(row[: length + 1])
            row = [BOS, *row[length + 1 :]]
    return rows + ([row] if len(row) > 1 else [])


def arrays(rows, length):
    """Return `(x, y, sample_weight)` for `fit`."""
    ids, mask = pad_rows(rows, length + 1)
    return {"token_ids": ids[:, :-1], "padding_mask": mask[:, :-1]}, ids[:, 1:], mask[:, 1:]


class Batches(keras.utils.PyDataset):
    """Shuffled training batches, segmented again each epoch."""

    def __init__(self, paragraphs, processor, dropout, batch_size, seed=0, **kwargs):
        super().__init__(**kwargs)
        self.paragraphs, self.processor, self.dropout, self.batch_size = (
            paragraphs,
            processor,
            dropout,
            batch_size,
        )
        self.rng = np.random.default_rng(seed)
        sentencepiece.set_random_generator_seed(seed)
        self._draw()

    def _draw(self):
        start = self.rng.integers(len(self.paragraphs))
        paragraphs = self.paragraphs[start:] + self.paragraphs[:start]
        sampled = dict(enable_sampling=True, alpha=self.dropout) if self.dropout else {}
        rows = rows_of(paragraphs, lambda p: self.processor.encode(p, **sampled), SEQUENCE_LENGTH)
        self.rows = [rows[i] for i in self.rng.permutation(len(rows))]

    def __len__(self):
        # Sampled segmentations differ in length, and Keras needs equally many batches per epoch.
        self.length = getattr(self, "length", len(self.rows) // self.batch_size * 19 // 20)
        return self.length

    def __getitem__(self, index):
        return arrays(
            self.rows[index * self.batch_size : (index + 1) * self.batch_size], SEQUENCE_LENGTH
        )

    def on_epoch_end(self):
        self._draw()


def bits_per_byte(model, paragraphs, processor):
    """Return held-out bits per byte. Each token counts once, in rows of the training length."""
    rows = rows_of(paragraphs, processor.encode, SEQUENCE_LENGTH)
    x, y, weight = arrays(rows, SEQUENCE_LENGTH)
    nats = model.score(x["token_ids"], x["padding_mask"], target_ids=y)
    return float((nats * weight).sum() / math.log(2) / sum(len(p.encode()) for p in paragraphs))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument(
        "--epochs",
        type=int,
        default=12,
        help="at most; also the length of the learning-rate schedule",
    )
    parser.add_argument(
        "--patience",
        type=int,
        default=2,
        help="epochs without a lower held-out loss before the end",
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--bpe-dropout", type=float, default=0.05)
    parser.add_argument("--vocabulary-size", type=int, default=4096)
    parser.add_argument("--steps", type=int, help="steps an epoch, to try things")
    options = parser.parse_args()

    keras.utils.set_random_seed(0)
    training, held_out = split(options.corpus.read_text(encoding="utf-8"))
    proto = train_vocabulary(training, options.vocabulary_size)
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    backbone = VaultGemmaBackbone(
        vocabulary_size=options.vocabulary_size,
        num_layers=4,
        num_query_heads=4,
        num_key_value_heads=4,
        hidden_dim=192,
        intermediate_dim=512,
        head_dim=64,
        max_sequence_length=SEQUENCE_LENGTH,
        initializer_range=0.05,
        name="vaultgemma_tiny",
    )
    preprocessor = VaultGemmaCausalLMPreprocessor(
        VaultGemmaTokenizer(proto=proto), sequence_length=SEQUENCE_LENGTH
    )
    model = VaultGemmaCausalLM(backbone, preprocessor)
    backbone.summary()

    batches = Batches(training, processor, options.bpe_dropout, options.batch_size)
    steps = options.steps or len(batches)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        steps * options.epochs,
        alpha=0.02,
        warmup_target=options.learning_rate,
        warmup_steps=min(200, steps),
    )
    optimizer = keras.optimizers.AdamW(
        schedule, weight_decay=options.weight_decay, beta_2=0.98, clipnorm=1.0
    )
    optimizer.exclude_from_weight_decay(var_names=["scale"])
    model.compile(optimizer)
    validation = arrays(rows_of(held_out, processor.encode, SEQUENCE_LENGTH), SEQUENCE_LENGTH)
    stop = keras.callbacks.EarlyStopping(
        "val_loss", patience=options.patience, restore_best_weights=True
    )
    history = model.fit(
        batches,
        steps_per_epoch=options.steps,
        validation_data=validation,
        epochs=options.epochs,
        callbacks=[stop],
        verbose=2,
    ).history

    best = int(np.argmin(history["val_loss"]))
    bits = bits_per_byte(model, held_out, processor)
    print(f"held-out bits per byte: {bits:.4f} after epoch {best + 1}")
    print(model.generate("Once upon a time", max_new_tokens=100))
    model.save_to_preset(str(options.target))
    write_card(options.target, backbone, bits, steps * (best + 1), options, training, held_out)


def write_card(target, backbone, bits, steps, options, training, held_out):
    """Write metadata.json and README.md of the preset."""
    metadata_file = target / "metadata.json"
    metadata = json.loads(metadata_file.read_text())
    size = {
        name: sum(len(p.encode()) for p in part)
        for name, part in (("training", training), ("held_out", held_out))
    }
    metadata |= {
        "description": "A VaultGemma of 2.8 M parameters, trained on children's classics: "
        "for tests and first steps.",
        "license": "Apache-2.0",
        "corpus": {
            "name": "fairy_tales.txt: Aesop, Alice, two Oz books, Grimm, The Wind in the Willows, "
            "The Jungle Book, The Secret Garden (Standard Ebooks editions)",
            "license": "CC0-1.0",
            "training_bytes": size["training"],
            "held_out_bytes": size["held_out"],
        },
        "training": {
            "steps": steps,
            "batch_size": options.batch_size,
            "sequence_length": SEQUENCE_LENGTH,
            "optimizer": f"AdamW, peak learning rate {options.learning_rate}, "
            f"weight decay {options.weight_decay}",
            "bpe_dropout": options.bpe_dropout,
        },
        "held_out_bits_per_byte": round(bits, 4),
        "privacy": None,
    }
    metadata_file.write_text(json.dumps(metadata, indent=4) + "\n")
    (target / "README.md").write_text(f"""# vaultgemma_tiny

{metadata["description"]} The block, the tied head and the ids of special tokens are VaultGemma's; \
the rest is small:
{backbone.count_params():,} parameters, {backbone.num_layers} layers, width {backbone.hidden_dim}, \
a vocabulary of {backbone.vocabulary_size} SentencePiece pieces, {SEQUENCE_LENGTH} positions.

- Corpus: {metadata["corpus"]["name"]}; {metadata["corpus"]["license"]}; \
{size["training"]:,} bytes for training, {size["held_out"]:,} held out.
- Training: {steps:,} steps of {options.batch_size} x {SEQUENCE_LENGTH} tokens, \
{metadata["training"]["optimizer"]}, until held-out loss stopped falling \
(`tools/train_tiny_preset.py`).
- Held-out bits per byte: {bits:.3f}.
- **Not privately trained**: this preset carries no differential-privacy guarantee.
- Licence of the weights: {metadata["license"]}.
""")


if __name__ == "__main__":
    main()
