"""Each subcommand: what it asks the library for, and what it prints."""

import inspect
import io
import sys
from types import SimpleNamespace

import keras_hub
import pytest
from common import error_of, run_command

import keras_vaultgemma
from keras_vaultgemma import VaultGemmaCausalLM, backend, cli, describe, finetune
from keras_vaultgemma.checkpoints import presets
from keras_vaultgemma.recipes import privacy_budget

PROMPT = "Once upon a time"


pytestmark = pytest.mark.usefixtures("no_cache")


@pytest.fixture
def asked(monkeypatch, tiny):
    """Stands in for the model that `generate` loads, and notes what it was asked for."""
    asked = SimpleNamespace(backbone=tiny.backbone, preprocessor=tiny.preprocessor, loaded=None)

    def from_preset(preset, **kwargs):
        asked.loaded = (preset, kwargs)
        return asked

    class Pieces(list):
        finish_reason = "length"

    def stream(inputs, max_new_tokens, stop):
        asked.inputs, asked.max_new_tokens, asked.stop = inputs, max_new_tokens, stop
        return Pieces([" A", " text."])

    asked.compile = lambda sampler: setattr(asked, "sampler", sampler)
    asked.stream = stream
    monkeypatch.setattr(
        backend, "cache_compilations", lambda folder: setattr(asked, "folder", folder)
    )
    monkeypatch.setattr(VaultGemmaCausalLM, "from_preset", from_preset)
    return asked


def test_generate_prints_the_prompt_and_its_continuation(capsys, tiny):
    assert cli.main(["generate", PROMPT, "--max-new-tokens", "8"]) == 0
    text = tiny.generate(PROMPT, max_new_tokens=8)
    assert text.startswith(PROMPT) and text != PROMPT
    assert capsys.readouterr().out == text + "\n"


def test_chat_prints_the_reply_alone(capsys, tiny):
    assert cli.main(["generate", "Who are you?", "--chat", "--max-new-tokens", "8"]) == 0
    reply = tiny.generate([{"role": "user", "content": "Who are you?"}], max_new_tokens=8)
    assert capsys.readouterr().out == reply + "\n"


def test_a_pipe_brings_the_prompt(tiny):
    done = run_command("generate", "--max-new-tokens", "8", input=PROMPT + "\n")
    assert done.returncode == 0
    assert done.stdout == tiny.generate(PROMPT, max_new_tokens=8) + "\n"


def test_an_unknown_backend_is_a_usual_error():
    done = run_command("info", "vaultgemma_tiny", env={"KERAS_BACKEND": "abacus"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "keras-vaultgemma: KERAS_BACKEND must be one of jax, torch, tensorflow. Received: KERAS_BACKEND='abacus'\n"
    )


def test_defaults(capsys, asked):
    assert cli.main(["generate", PROMPT]) == 0
    assert capsys.readouterr().out == PROMPT + " A text.\n"
    assert asked.folder == presets.cache_home() / "compiled"
    assert asked.loaded == ("vaultgemma_tiny", {})
    assert type(asked.sampler) is keras_hub.samplers.GreedySampler
    assert (asked.inputs, asked.max_new_tokens, asked.stop) == (PROMPT, 64, [])


def test_options_reach_the_library(asked):
    options = [
        "--preset",
        "a/folder",
        "--dtype",
        "bfloat16",
        "--chat",
        "--stop",
        "\n\n",
        "--stop",
        "END",
    ]
    assert cli.main(["generate", PROMPT, *options]) == 0
    assert asked.stop == ["\n\n", "END"]
    assert asked.loaded == ("a/folder", {"dtype": "bfloat16"})
    assert asked.inputs == [{"role": "user", "content": PROMPT}]


@pytest.mark.parametrize(
    "name, sampler, takes",
    [
        ("greedy", keras_hub.samplers.GreedySampler, ""),
        ("random", keras_hub.samplers.RandomSampler, "temperature seed"),
        ("top_k", keras_hub.samplers.TopKSampler, "temperature seed"),
        ("top_p", keras_hub.samplers.TopPSampler, "temperature seed"),
        ("beam", keras_hub.samplers.BeamSampler, "temperature"),
        ("contrastive", keras_hub.samplers.ContrastiveSampler, "temperature"),
    ],
)
def test_samplers(capsys, asked, name, sampler, takes):
    values = {"temperature": 0.5, "seed": 3}
    taken = {option: values[option] for option in takes.split()}
    options = [word for option, value in taken.items() for word in (f"--{option}", str(value))]
    assert cli.main(["generate", PROMPT, "--sampler", name, *options]) == 0
    assert type(asked.sampler) is sampler
    assert {option: asked.sampler.get_config()[option] for option in taken} == taken
    capsys.readouterr()
    for option in values.keys() - taken.keys():
        error = error_of(
            capsys, "generate", PROMPT, "--sampler", name, f"--{option}", str(values[option])
        )
        assert error.startswith(
            f"--{option} changes nothing with --sampler {name}; it goes with random, top_k, top_p"
        )
        assert error.endswith(f"Received: --{option} {values[option]}")


def test_text_ends_at_the_context(capsys, asked, tiny):
    context = tiny.backbone.max_sequence_length
    word = tiny.preprocessor.tokenizer("a")
    assert len(word) == 1 and len(tiny.preprocessor.tokenizer(" a" * 4)) == 4
    assert cli.main(["generate", " a" * (context - 3)]) == 0
    assert asked.max_new_tokens == 2  # what <bos> and the prompt leave
    capsys.readouterr()
    error = error_of(capsys, "generate", " a" * (context - 1))
    assert error == (
        f"PROMPT must have at most {context - 1} tokens, `<bos>` included: the model's context is {context}. "
        f"Received: {context} tokens"
    )


def test_pieces_are_written_as_they_come_and_an_interrupt_keeps_them(capsys, monkeypatch, asked):
    class Interrupted(list):
        finish_reason = "interrupted"

    written = []
    monkeypatch.setattr(
        cli, "print", lambda *text, **kwargs: written.append("".join(text)), raising=False
    )
    asked.stream = lambda *args, **kwargs: Interrupted([" A", " te"])
    assert cli.main(["generate", PROMPT]) == 130
    assert written == [PROMPT, " A", " te", ""]


@pytest.mark.parametrize(
    "piped, prompt", [("one\n", "one"), ("one", "one"), ("one\ntwo\n\n", "one\ntwo\n")]
)
def test_a_piped_prompt_loses_one_line_break(monkeypatch, asked, piped, prompt):
    monkeypatch.setattr(sys, "stdin", io.StringIO(piped))
    assert cli.main(["generate"]) == 0
    assert asked.inputs == prompt


def test_an_argument_is_the_prompt_whatever_is_piped(monkeypatch, asked):
    monkeypatch.setattr(sys, "stdin", io.StringIO("piped"))
    assert cli.main(["generate", ""]) == 0
    assert asked.inputs == ""


@pytest.mark.parametrize("stdin", [None, io.StringIO(), SimpleNamespace(isatty=lambda: True)])
def test_no_prompt(monkeypatch, capsys, stdin):
    monkeypatch.setattr(sys, "stdin", stdin)
    error = error_of(capsys, "generate")
    assert error == "PROMPT must be an argument or come through a pipe. Received: neither"


def test_info_prints_the_description(capsys):
    assert cli.main(["info", "vaultgemma_1b"]) == 0
    assert capsys.readouterr().out == describe("vaultgemma_1b") + "\n"


@pytest.mark.parametrize(
    "options, changes",
    [
        ("", {}),
        (
            "--to hf --dtype bfloat16 --shard-size 5MB --verify --overwrite",
            dict(to="hf", dtype="bfloat16", shard_size="5MB", verify=True, overwrite=True),
        ),
    ],
)
def test_convert_asks_the_library_and_says_what_it_wrote(capsys, monkeypatch, options, changes):
    asked = {}

    def convert(**kwargs):
        asked.update(kwargs)
        return {"parameter_count": 2754240, "dtype": "bfloat16"}

    monkeypatch.setattr(keras_vaultgemma, "convert", convert)
    assert cli.main(["convert", "from/here", "there", *options.split()]) == 0
    defaults = dict(to="keras", dtype=None, shard_size=None, verify=False, overwrite=False)
    assert asked == dict(source="from/here", target="there", **{**defaults, **changes})
    verified = ", equal to the source" if changes else ""
    assert capsys.readouterr().out == f"there: 2,754,240 parameters in bfloat16{verified}\n"


def test_convert_fails_in_one_line(capsys, tmp_path):
    assert error_of(capsys, "convert", "vaultgemma_tiny", str(tmp_path)).startswith(
        f"{tmp_path} exists. Pass overwrite"
    )
    assert "argument --to: invalid choice: 'pt'" in error_of(
        capsys, "convert", "x", "y", "--to", "pt"
    )
    error = error_of(
        capsys,
        "convert",
        "vaultgemma_tiny",
        str(tmp_path / "new"),
        "--shard-size",
        "big",
        "--to",
        "hf",
    )
    assert error == "`shard_size` must be bytes above 0, such as 5000000 or '5GB'. Received: 'big'"


def test_epsilon_prints_the_report(capsys):
    assert (
        cli.main(["epsilon", "--rows", "100", "--batch", "50", "--epochs", "2", "--noise", "5"])
        == 0
    )
    assert (
        capsys.readouterr().out
        == privacy_budget.privacy_budget(100, 50, 2, noise_multiplier=5.0) + "\n"
    )


def test_epsilon_asks_the_library(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(
        privacy_budget, "privacy_budget", lambda *args: asked.append(args) or "the answer"
    )
    options = [
        "--rows",
        "500",
        "--batch",
        "50",
        "--epochs",
        "2",
        "--epsilon",
        "5",
        "--delta",
        "1e-3",
        "--png",
        "a.png",
    ]
    assert cli.main(["epsilon", *options]) == 0
    assert asked == [(500, 50, 2, None, 5.0, 1e-3, "a.png")]
    assert capsys.readouterr().out == "the answer\n"


def test_finetune_asks_the_library(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(
        keras_vaultgemma, "finetune", lambda **kwargs: asked.append(kwargs) or "the answer"
    )
    assert cli.main(["finetune", "--data", "a.txt"]) == 0
    assert capsys.readouterr().out == "the answer\n"
    defaults = inspect.signature(finetune).parameters
    assert asked == [
        {name: "a.txt" if name == "data" else p.default for name, p in defaults.items()}
    ]

    options = dict(
        preset="p", validation="v.txt", text_column="t", prompt_column="q", response_column="a", lora_rank=4, epochs=5,
        batch_size=2, learning_rate=0.1, sequence_length=9, dtype="bfloat16", output="o", seed=3, png="c.png",
    )  # fmt: skip
    arguments = [
        x for name, value in options.items() for x in (f"--{name.replace('_', '-')}", str(value))
    ]
    flags = ["--gradient-checkpointing", "--merge", "--no-packing", "--save-every", "7"]
    flags += [
        "--private",
        "--epsilon",
        "3",
        "--delta",
        "1e-5",
        "--noise",
        "2",
        "--clip-norm",
        "0.5",
    ]
    assert cli.main(["finetune", "--data", "a.txt", *arguments, *flags]) == 0
    private = dict(private=True, epsilon=3.0, delta=1e-5, noise_multiplier=2.0, clip_norm=0.5)
    expected = {
        "data": "a.txt",
        **options,
        **private,
        "gradient_checkpointing": True,
        "merge": True,
        "packed": False,
        "save_freq": 7,
    }
    assert asked[1] == expected


def test_finetune_from_a_file_to_an_adapter(tmp_path):
    (tmp_path / "a.csv").write_text(
        "text\n" + "".join(f"The hare and tortoise {i}\n" for i in range(8))
    )
    done = run_command(
        "finetune", "--data", "a.csv", "--epochs", "2", "--sequence-length", "16", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "vaultgemma_tiny on a.csv: 7 rows to train on, 1 held out\nHeld out, before: perplexity "
    )
    assert "finetuned/adapter: for lora.load_adapter" in done.stdout
    assert (
        "Epoch 2/2" in done.stderr
        and "loss: " in done.stderr
        and "tokens_per_second: " in done.stderr
    )
    assert (tmp_path / "finetuned" / "adapter" / "adapter_config.json").is_file()
