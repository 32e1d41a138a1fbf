"""The chat of the command line."""

import io
import sys

import pytest

from keras_vaultgemma import VaultGemmaCausalLM, cli, lora
from keras_vaultgemma.recipes.chat import Chat, chat

pytestmark = [pytest.mark.first_backend, pytest.mark.usefixtures("no_cache")]


def talk(*lines, **options):
    """The text that a chat prints."""
    rest = iter(lines)
    return "".join(chat(lambda: next(rest, None), max_new_tokens=4, **options))


def test_turns_reach_the_model(tiny):
    tiny.compile(sampler="greedy")
    first = tiny.generate([{"role": "user", "content": "Who?"}], max_new_tokens=4)
    messages = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Why?"},
    ]
    second = tiny.generate(messages, max_new_tokens=4)
    text = talk("Who?", "", "Why?", "/history", "/reset", "/history", "Who?", "/exit", "never read")
    note, rest = text.split("\n", 1)
    assert note.startswith("vaultgemma_tiny. It is pre-trained only")
    history = "".join(
        f"{role}: {content.strip()}\n"
        for role, content in (
            ("user", "Who?"), ("assistant", first), ("user", "Why?"), ("assistant", second),
        )
    )  # fmt: skip
    assert rest == f"{first}\n{second}\n{history}{first}\n"


def test_commands_and_mistakes():
    text = talk("/what", "a<end_of_turn>", "a " * 600)
    assert "/reset    forget the chat" in text
    assert "must be a string without <start_of_turn>" in text
    assert "A message must leave 16 of the context's 512 tokens" in text


def test_an_adapter_is_not_called_pre_trained(tmp_path):
    model = VaultGemmaCausalLM.from_preset("vaultgemma_tiny")
    lora.add(model, rank=1, targets="query")
    lora.save_adapter(model, tmp_path / "adapter")
    assert "pre-trained only" not in talk(preset="vaultgemma_tiny", adapter=tmp_path / "adapter")


def test_the_oldest_turns_are_left_out_of_a_full_context(tiny):
    tiny.compile(sampler="greedy")
    turns = Chat(tiny, 4, {})
    for number in range(5):
        list(turns.reply(f"{number} " + "and so on " * 40))
    assert turns.dropped == 4 and len(turns.messages) == 10
    kept = [*turns.messages[4:-1]]
    assert turns.messages[-1]["content"] == tiny.generate(kept, max_new_tokens=4)


def test_an_interrupted_reply_stays_in_the_chat(tiny, monkeypatch):
    class Interrupted(list):
        finish_reason = "interrupted"

    turns = Chat(tiny, 4, {})
    monkeypatch.setattr(tiny, "stream", lambda *args, **kwargs: Interrupted(["A", " te"]))
    assert list(turns.reply("Hello")) == ["A", " te"]
    assert turns.messages[-1] == {"role": "assistant", "content": "A te"}


def test_the_command_reads_a_pipe(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\n/history\n"))
    assert cli.main(["chat", "--max-new-tokens", "3", "--temperature", "0.9", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert "pre-trained only" in out and "user: Who?" in out and "assistant: " in out
