"""Generate text on each backend, and train privately: `python tools/demo.py [BACKEND ...]`.

A process loads one Keras backend, so the demo runs the package's command once per backend. Decoding
is greedy, so all backends generate the same text. If two differ, the demo shows where they diverge
and exits with code 1. Then one of them is fine-tuned on made-up notes with differential privacy,
and a page says what that protects.
"""

import os
import random
import shlex
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

BACKENDS = ("jax", "torch", "tensorflow")
PROMPT = "There was once a"
ARGUMENTS = ["generate", PROMPT, "--max-new-tokens", "60", "--repetition-penalty", "1.1"]
WIDTH = 76
COMPLAINTS = ("a sore throat", "a cough", "back pain", "a headache", "no appetite")
FINETUNE = (
    "finetune --data notes.txt --private --epsilon 8 --report "
    "--sequence-length 24 --epochs 4 --batch-size 70"
)
CONTEXT = 40
"""Characters that are shown on each side of a difference."""


def generate(backend):
    """Return the text that a backend generates, or print its error and return None."""
    done = subprocess.run(
        [sys.executable, "-m", "keras_vaultgemma", *ARGUMENTS],
        env={**os.environ, "KERAS_BACKEND": backend, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
    )
    if done.returncode:
        print(f"\n{done.stderr.strip()}", file=sys.stderr)
        return None
    return done.stdout.removesuffix("\n")


def train_privately(backend, folder):
    """Fine-tune on made-up notes with privacy; return the path of the page about it, or None."""
    notes = [f"Patient {i} has had {COMPLAINTS[i % 5]} for {i % 9} days." for i in range(310)]
    random.Random(0).shuffle(notes)
    (folder / "notes.txt").write_text("\n".join(notes), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "keras_vaultgemma", *FINETUNE.split()],
        # The user's own ledger of private runs is left alone.
        env={**os.environ, "KERAS_BACKEND": backend, "KERAS_VAULTGEMMA_HOME": str(folder)},
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        print(f"\n{done.stderr.strip()}", file=sys.stderr)
        return None
    return next((folder / "finetuned").glob("report*.html"))


def difference(name, text, other_name, other_text):
    """Describe where two texts diverge."""
    pairs = zip(text, other_text, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(other_text)))
    width = max(len(name), len(other_name))
    before = text[max(0, same - CONTEXT) : same]
    return "\n".join(
        [
            f"{name} and {other_name} generate different text after {before!r}:",
            f"  {name:{width}}  {text[same : same + CONTEXT]!r}",
            f"  {other_name:{width}}  {other_text[same : same + CONTEXT]!r}",
        ]
    )


def main(backends):
    # Typographic quotation marks must not fail on a terminal that cannot show them.
    sys.stdout.reconfigure(errors="replace")
    print("vaultgemma_tiny: VaultGemma with 5.6 million parameters, trained on tales.\n")
    print(f"  $ keras-vaultgemma {shlex.join(ARGUMENTS)}\n")
    first = None
    for backend in backends:
        print(f"  {backend:<10} ", end="", flush=True)
        start = time.perf_counter()
        text = generate(backend)
        if text is None:
            return 1
        print(f"{time.perf_counter() - start:5.1f} s")
        if first is None:
            first = text
        elif text != first:
            print(f"\n{difference(backends[0], first, backend, text)}", file=sys.stderr)
            return 1
    print()
    for line in first.splitlines():
        print(textwrap.fill(line, WIDTH, initial_indent="  ", subsequent_indent="  "))
    if len(backends) > 1:
        print(f"\nAll {len(backends)} backends generate the same text, word for word.")
    print(
        f"\nNow 310 made-up notes of patients, with privacy:\n\n  $ keras-vaultgemma {FINETUNE}\n"
    )
    start = time.perf_counter()
    # PyTorch starts fastest.
    backend = "torch" if "torch" in backends else backends[0]
    page = train_privately(backend, Path(tempfile.mkdtemp(prefix="keras_vaultgemma_demo_")))
    if page is None:
        return 1
    print(f"  {backend:<10} {time.perf_counter() - start:5.1f} s\n")
    print(f"What that protects, and what it cost, is on this page:\n\n  {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or BACKENDS))
