"""Answers as the JSON objects of OpenAI's interface."""

import codecs
import itertools
import re
import secrets
import time

SPACE = "\u2581"
"""The character that stands for a space in SentencePiece's vocabularies."""

LEAST = -9999.0
"""The log-probability that stands for minus infinity, which JSON lacks, as in OpenAI's answers."""


class Responses:
    """The JSON objects of one call.

    Args:
        call: `requests.Call`.
        preprocessor: `VaultGemmaCausalLMPreprocessor`.
    """

    def __init__(self, call, preprocessor):
        self._call, self._preprocessor = call, preprocessor
        self._is_chat = call.is_chat
        kind = "chat.completion" if call.is_chat else "text_completion"
        self._kinds = kind, f"{kind}.chunk" if call.is_chat else kind
        self._head = {
            "id": f"{'chatcmpl' if call.is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": call.model,
        }
        self._log_probs = [LogProbs(call, row.prompt, preprocessor.tokenizer) for row in call.rows]

    def whole(self, pieces):
        """Return the object of all answers, each of which is one `Piece`."""
        choices = [self._choice(i, piece) for i, piece in enumerate(pieces)]
        usage = self._usage([piece.token_count for piece in pieces])
        return {"object": self._kinds[0], **self._head, "choices": choices, "usage": usage}

    def first_chunks(self):
        """Return the objects that begin a stream: in a chat, the role of each answer's author."""
        if not self._is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk([dict(index=i, delta=delta, logprobs=None, finish_reason=None)])
            for i in range(len(self._call.rows))
        ]

    def chunk(self, i, piece):
        """Return the object of a `Piece` of answer i."""
        return self._chunk([self._choice(i, piece, is_chunk=True)])

    def usage_chunk(self, counts):
        """Return the object that ends a stream, if the call asks for it, else None."""
        if not self._call.include_usage:
            return None
        return {**self._chunk([]), "usage": self._usage(counts)}

    def _chunk(self, choices):
        return {"object": self._kinds[1], **self._head, "choices": choices}

    def _choice(self, i, piece, is_chunk=False):
        log_probs, is_first = self._log_probs[i], self._log_probs[i].is_empty
        choice = {"index": i, "logprobs": None, "finish_reason": piece.finish_reason}
        if self._call.log_probs is not None:
            choice["logprobs"] = log_probs.of(piece)
        log_probs.is_empty = False
        if not self._is_chat:
            echo = self._prompt_text(i) if self._call.echo and is_first else ""
            return {**choice, "text": echo + piece.text}
        if is_chunk:
            return {**choice, "delta": {"content": piece.text} if piece.text else {}}
        return {**choice, "message": {"role": "assistant", "content": piece.text}}

    def _prompt_text(self, i):
        return self._preprocessor.detokenize([self._call.rows[i].prompt])[0]

    def _usage(self, counts):
        rows = self._call.rows[:: self._call.choices]
        prompt, answers = sum(len(row.prompt) for row in rows), sum(counts)
        return dict(prompt_tokens=prompt, completion_tokens=answers, total_tokens=prompt + answers)


class LogProbs:
    """Log-probabilities of the tokens of one answer, in the form of a chat's or a completion's.

    Args:
        call: `requests.Call`.
        prompt: list of ids.
        tokenizer: `VaultGemmaTokenizer`.

    Attributes:
        is_empty: bool. True until the first piece.
    """

    def __init__(self, call, prompt, tokenizer):
        self.is_empty = True
        self._call, self._prompt = call, prompt
        self._tokenizer = tokenizer
        self._special = set(tokenizer.special_token_ids)
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._offset = 0

    def of(self, piece):
        """Return the object of the tokens of a `Piece`."""
        ids, log_probs, top = piece.ids, piece.log_probs, piece.top or [([], [])] * len(piece.ids)
        if piece.prompt_scores is not None:
            ids = [*self._prompt, *ids]
            log_probs = [None, *piece.prompt_scores.log_probs, *log_probs]
            top = [None, *piece.prompt_scores.top, *top]
        # JSON has no infinity.
        log_probs = [p if p is None else max(p, LEAST) for p in log_probs]
        tokens = list(zip(ids, log_probs, top, strict=True))
        if self._call.is_chat:
            return {"content": [self._chat_entry(*token) for token in tokens]}
        return {
            "tokens": [self._text(i) for i in ids],
            "token_logprobs": log_probs,
            "top_logprobs": [self._completion_top(*token) for token in tokens],
            "text_offset": [self._next_offset(i) for i in ids],
        }

    def _chat_entry(self, i, log_prob, top):
        likely = itertools.islice(zip(*top, strict=True), self._call.log_probs)
        return {
            **self._named(i, log_prob),
            "top_logprobs": [self._named(int(j), float(p)) for j, p in likely],
        }

    def _named(self, i, log_prob):
        data = list(self._bytes(i))
        return {"token": self._text(i), "logprob": max(log_prob, LEAST), "bytes": data}

    def _completion_top(self, i, log_prob, top):
        """Return `{token: log-probability}`, which has the chosen token, too."""
        if top is None:
            return None
        found = {}
        for j, p in itertools.islice(zip(*top, strict=True), self._call.log_probs):
            # The first of several tokens of the same text is the most likely one.
            found.setdefault(self._text(int(j)), max(float(p), LEAST))
        found.setdefault(self._text(i), log_prob)
        return found

    def _next_offset(self, i):
        start = self._offset
        if i not in self._special:
            self._offset += len(self._decode(self._bytes(i)))
        return start

    def _text(self, i):
        data = self._bytes(i)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _bytes(self, i):
        piece = self._tokenizer.id_to_token(i)
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()
