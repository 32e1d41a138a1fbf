"""A model for lm-evaluation-harness, which is imported on first use (extra `eval`)."""

import os
from typing import TYPE_CHECKING, Any

import keras

from keras_vaultgemma._validation import check_choice
from keras_vaultgemma.evaluation.generation import generate_until
from keras_vaultgemma.evaluation.pairs import (
    TRUNCATIONS,
    cut_pair,
    encode_pairs,
    positions_of,
    score_ids,
    tokenizer_of,
)
from keras_vaultgemma.evaluation.rolling import measure_rolling

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM


def import_lm_eval() -> Any:
    """Import lm-evaluation-harness.

    Raises:
        ImportError: If it is not installed. The message names the extra to install.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise ImportError(
            f"Tasks need lm-evaluation-harness: pip install 'keras-vaultgemma[eval]' ({error})"
        ) from error
    return lm_eval


def lm_eval_model(
    model: keras.Model,
    *,
    truncation: str = "keep_bos",
    score_bos: bool = False,
    max_length: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    verbose: bool = True,
) -> "TemplateLM":
    """Return a model that lm-evaluation-harness evaluates: `lm_eval.simple_evaluate(model=...)`.

    With `truncation="lm_eval"` and `score_bos=True` it agrees with the harness's own model "hf" on
    the folder that `convert --to hf` writes.

    Args:
        model: `VaultGemmaCausalLM` with a preprocessor.
        truncation: string, as for `score_pairs` and `measure_rolling`. Defaults to "keep_bos".
        score_bos: bool, as for `measure_rolling`. Defaults to False.
        max_length: int. Number of positions. Defaults to the model's.
        checkpoint: path of a folder or None, as for `score_pairs`.
        verbose: bool. If True, show progress bars on a terminal. Defaults to True.

    Returns:
        `lm_eval.api.model.TemplateLM` with two attributes more: `pairs`, the number of pairs that
        were scored, and `truncated`, how many of them were cut.

    Raises:
        ImportError: If lm-evaluation-harness is not installed.
        ValueError: If an argument is out of its range.

    Example:

    ```python
    from keras_vaultgemma import VaultGemmaCausalLM, evaluation

    model = evaluation.lm_eval_model(VaultGemmaCausalLM.from_preset("vaultgemma_tiny"))
    ids = model.tok_encode("Once upon a time")
    # lm_eval.simple_evaluate(model=model, tasks=["piqa"]) downloads PIQA and evaluates the model.
    ```
    """
    import_lm_eval()
    from lm_eval.api.model import TemplateLM

    check_choice("truncation", truncation, TRUNCATIONS)
    tokenizer, length = tokenizer_of(model), positions_of(model, max_length)

    class VaultGemmaLM(TemplateLM):
        """The model of the enclosing call."""

        def __init__(self):
            super().__init__()
            self.pairs = self.truncated = 0

        @property
        def eot_token_id(self):
            return tokenizer.end_token_id

        @property
        def prefix_token_id(self):
            return tokenizer.start_token_id

        @property
        def max_length(self):
            return length

        @property
        def tokenizer_name(self):
            return model.name

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            start = [] if add_special_tokens is False else [tokenizer.start_token_id]
            return [*start, *map(int, tokenizer.tokenize([string])[0])]

        def loglikelihood(self, requests, disable_tqdm=False):
            # All at once, because the inherited method tokenizes every context once a choice.
            texts = [request.args for request in requests]
            encoded = encode_pairs(tokenizer, texts)
            return self._loglikelihood_tokens(
                [(text, *ids) for text, ids in zip(texts, encoded, strict=True)], disable_tqdm
            )

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
            pairs = [
                cut_pair(i, tuple(context), tuple(continuation), length, truncation)
                for i, (_, context, continuation) in enumerate(requests)
            ]
            self.pairs += len(pairs)
            self.truncated += sum(pair.tokens_cut > 0 for pair in pairs)
            log_probs, is_greedy = score_ids(
                model,
                [(pair.context, pair.continuation) for pair in pairs],
                checkpoint,
                verbose and not disable_tqdm,
            )
            return list(zip(log_probs.tolist(), is_greedy.tolist(), strict=True))

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            found = measure_rolling(
                model,
                [request.args[0] for request in requests],
                truncation=truncation,
                score_bos=score_bos,
                max_length=length,
                checkpoint=checkpoint,
                verbose=verbose and not disable_tqdm,
            )
            return list(found.log_probs)

        def generate_until(self, requests, disable_tqdm=False):
            return generate_until(
                model,
                [request.args for request in requests],
                max_length=length,
                truncation=truncation,
                checkpoint=checkpoint,
                verbose=verbose and not disable_tqdm,
            )

    return VaultGemmaLM()
