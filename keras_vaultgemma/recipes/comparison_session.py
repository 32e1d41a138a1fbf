"""The measurements of a comparison: of each model on the same records, resumable after a kill."""

import math
import sys
import warnings

import numpy as np
from tqdm import tqdm

from keras_vaultgemma.data.token_ids import unpad_rows
from keras_vaultgemma.evaluation import provenance
from keras_vaultgemma.evaluation.claim import find_claim
from keras_vaultgemma.evaluation.extraction import Extractor
from keras_vaultgemma.evaluation.likelihood import Likelihood, measure
from keras_vaultgemma.evaluation.membership import measure_membership
from keras_vaultgemma.evaluation.memorization import APPROXIMATE, measure_memorization
from keras_vaultgemma.evaluation.parts import Parts
from keras_vaultgemma.evaluation.privacy_audit import audit
from keras_vaultgemma.evaluation.tasks import measure_tasks
from keras_vaultgemma.evaluation.texts import read_texts
from keras_vaultgemma.recipes import sources
from keras_vaultgemma.recipes.canaries import included_canaries

MODELS = ("base", "plain", "private")

LENGTH = 50
"""Tokens of a prefix, and of a suffix, in the report on VaultGemma."""

TOP_K = 40
"""Number of tokens that probabilistic extraction samples from, as in Hayes et al."""

CLOSEST = 3
"""Number of records of each model that the page shows, masked unless their text is asked for."""

BATCH_ROWS = 16
"""Rows of held-out text that are measured together, and whose likelihood is stored together."""


class Session:
    """The measurements of one comparison, which resume after a kill.

    Args:
        found: dict of `Source`s by "base", "plain" (optional) and "private".
        dtype: string or None. Dtype of the weights.
        preprocessing: dict. Attributes of the preprocessor, or None for the preset's own.
        parts: `pathlib.Path` of the folder of finished parts.
    """

    def __init__(self, found, dtype, preprocessing, parts):
        self._found, self._dtype, self._preprocessing = found, dtype, preprocessing
        self.parts = parts

    def describe_models(self):
        """Return the description of each model, with the SHA-256 of its files."""
        is_terminal = sys.stderr is not None and sys.stderr.isatty()
        with tqdm(
            desc="SHA-256", unit="B", unit_scale=True, leave=False, disable=not is_terminal
        ) as bar:
            return {
                name: provenance.describe_model(*self._found[name], report=bar.update)
                for name in MODELS
                if name in self._found
            }

    def measure_tasks(self, tasks, include_path, limit):
        """Return the results of benchmark tasks by model, {} without tasks."""
        if tasks is None:
            return {}
        return {
            name: measure_tasks(
                self._load(name),
                tasks,
                include_path=include_path,
                limit=limit,
                checkpoint=self.parts,
            ).as_dict()
            for name in MODELS
            if name in self._found
        }

    def measure(
        self, train, held_out, prefix_length, suffix_length, max_records, canaries, show_text
    ):
        """Return what the comparison says about the models and the data, as a dict."""
        result = {"notes": [], "audit": {}}
        result |= {name: {} for name in ("likelihood", "memorization", "membership", "closest")}
        base = self._load("base")
        numbered, unseen = (_rows(records, base, max_records) for records in (train, held_out))
        members, unseen = [*numbered.values()], [*unseen.values()]
        included = [] if canaries is None else included_canaries(canaries)
        result["data"] = {
            "train": provenance.describe_data(train, len(members), included),
            "held_out": provenance.describe_data(held_out, len(unseen)),
        }
        lengths = _lengths(members, prefix_length, suffix_length)
        for name in (name for name in MODELS if name in self._found):
            model = base if name == "base" else self._load(name)
            reference = None if name == "base" else base
            result["likelihood"][name] = self._likelihood(model, held_out, name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # which the results have, too
                result["membership"][name] = measure_membership(
                    model, members, unseen, reference=reference, checkpoint=self.parts
                ).as_dict()
                try:
                    result["memorization"][name] = measure_memorization(
                        model,
                        members,
                        controls=unseen,
                        baseline=reference,
                        prefix_length=lengths[0],
                        suffix_length=lengths[1],
                        top_k=TOP_K,
                        checkpoint=self.parts,
                    ).as_dict()
                except ValueError as error:  # no record is long enough
                    result["notes"].append(f"Repetition was not measured. {error}")
                else:
                    result["closest"][name] = self._closest(model, numbered, lengths, show_text)
            if name == "private":
                dataset = result["data"]["train"]["fingerprint"]
                claim = find_claim(model.privacy.ledger, dataset)
                result["claim"] = claim.as_dict()
            if canaries is not None and name != "base":
                is_claimed = name == "private" and claim.limits is not None
                result["audit"][name] = audit(
                    model,
                    canaries,
                    reference=base,
                    claim=(claim.epsilon, claim.delta) if is_claimed else None,
                    checkpoint=self.parts,
                ).as_dict()
        return result

    def _load(self, name):
        model = sources.load_model(self._found[name], self._dtype)
        for name, value in self._preprocessing.items():
            if value is not None:
                setattr(model.preprocessor, name, value)
        return model

    def _likelihood(self, model, held_out, name):
        """Return the `Likelihood` of held-out records as a dict."""
        data = held_out.tokenize(model.preprocessor, packed=True)
        has_label = data["sample_weight"].any(axis=1)
        arrays = [data["x"]["token_ids"], data["x"]["padding_mask"], data["y"]]
        arrays = [array[has_label] for array in (*arrays, data["sample_weight"])]
        batches = [
            tuple(array[i : i + BATCH_ROWS] for array in arrays)
            for i in range(0, len(arrays[0]), BATCH_ROWS)
        ]

        def compute(token_ids, padding_mask, y, weights):
            x = {"token_ids": token_ids, "padding_mask": padding_mask}
            return {"likelihood": np.array(measure(model, x, y, weights))}

        label = f"likelihood, {name}"
        found = Parts(self.parts).compute(compute, batches, model, [], label, True)
        nats, tokens, size = np.sum([part["likelihood"] for part in found], axis=0).tolist()
        likelihood = Likelihood(nats, int(tokens), int(size))
        figures = {
            "perplexity": likelihood.perplexity,
            "bits_per_byte": likelihood.bits_per_byte,
            **likelihood._asdict(),
        }
        return {name: x if math.isfinite(x) else None for name, x in figures.items()}

    def _closest(self, model, numbered, lengths, show_text):
        """Return the training records that a model comes closest to repeating.

        Their parts are those that `measure_memorization` has just stored.
        """
        prefix, suffix = lengths
        windows = {}
        for i, row in numbered.items():
            ids = row[: prefix + suffix]
            if len(ids) == prefix + suffix:
                windows.setdefault(tuple(ids), i)
        rows = np.array([*windows], "int32")
        parts = Parts(self.parts)
        extractor = Extractor(model, prefix, suffix, APPROXIMATE, TOP_K, parts, True)
        distances = extractor(rows, "records").distances
        return [
            {
                "record": windows[tuple(rows[i].tolist())] + 1,
                "distance": float(distances[i]),
                "text": model.preprocessor.detokenize([rows[i, prefix:].tolist()])[0]
                if show_text
                else None,
            }
            for i in np.argsort(distances, kind="stable")[:CLOSEST]
        ]


def _rows(records, model, count):
    """Return the token ids of at most `count` records, as they are trained on, by their index."""
    x, y, _ = model.preprocessor.call(records.samples)
    # The last label is not among the inputs.
    ids = np.concatenate([x["token_ids"][:, :1], y], axis=1)
    mask = np.concatenate([x["padding_mask"][:, :1], x["padding_mask"]], axis=1)
    found = {i: read_texts([row], model).rows for i, row in enumerate(unpad_rows(ids, mask))}
    found = {i: rows[0] for i, rows in found.items() if rows}
    chosen = np.linspace(0, len(found) - 1, min(count, len(found))).astype(int)
    indices = [*found]
    return {indices[i]: found[indices[i]] for i in chosen}


def _lengths(rows, prefix_length, suffix_length):
    """Return the tokens of a prefix and of a suffix: 50, or less if most records are shorter."""
    half = min(LENGTH, max(1, int(np.median([len(row) for row in rows]) - 1) // 2))
    return prefix_length or half, suffix_length or half
