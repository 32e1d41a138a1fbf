"""Generate the same text on each backend: `python tools/demo.py [BACKEND ...]`.

A process loads one Keras backend, so the demo runs the package's command once per backend. Decoding
is greedy, so all backends generate the same text. If two differ, the demo shows where they diverge
and exits with code 1.
"""

import os
import shlex
import subprocess
import sys
import textwrap
import time

BACKENDS = ("jax", "torch", "tensorflow")
PROMPT = "The Fox and the"
ARGUMENTS = ["generate", PROMPT, "--max-new-tokens", "60"]
WIDTH = 76
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
    print("vaultgemma_tiny: VaultGemma with 2.8 million parameters, trained on fairy tales.\n")
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
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or BACKENDS))
