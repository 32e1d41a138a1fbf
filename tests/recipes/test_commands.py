"""Each subcommand: the recipe it calls, with which arguments, and what it prints."""

import inspect
import io
import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from types import SimpleNamespace

import keras_hub
import pytest
from common import error_of, run_command

from keras_vaultgemma import VaultGemmaCausalLM, backend, cli, compare
from keras_vaultgemma.checkpoints import presets
from keras_vaultgemma.recipes.describe import describe
from keras_vaultgemma.recipes.privacy_budget import privacy_budget

PROMPT = "Once upon a time"


pytestmark = [pytest.mark.any_backend, pytest.mark.usefixtures("no_cache")]


@pytest.fixture
def fake_model(monkeypatch, tiny):
    """Replace the model that `generate` loads by one that records its arguments."""
    fake_model = SimpleNamespace(
        backbone=tiny.backbone, preprocessor=tiny.preprocessor, loaded=None
    )

    def from_preset(preset, **kwargs):
        fake_model.loaded = (preset, kwargs)
        return fake_model

    class Pieces(list):
        finish_reason, ids = "length", [7, 8]

    def stream(inputs, max_new_tokens, stop, **options):
        fake_model.inputs, fake_model.max_new_tokens, fake_model.stop = inputs, max_new_tokens, stop
        fake_model.options = options
        return Pieces([" A", " text."])

    fake_model.compile = lambda sampler: setattr(fake_model, "sampler", sampler)
    fake_model.stream = stream
    monkeypatch.setattr(
        backend, "cache_compilations", lambda folder: setattr(fake_model, "folder", folder)
    )
    monkeypatch.setattr(VaultGemmaCausalLM, "from_preset", from_preset)
    return fake_model


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
    """Whatever the encoding of standard input and output. Standard error begins with the backend."""
    options = dict(input=f"“{PROMPT}\n", env={"PYTHONIOENCODING": "ascii"}, encoding="utf-8")
    done = run_command("generate", "--max-new-tokens", "8", **options)
    assert done.returncode == 0, done.stderr
    text = tiny.generate(f"“{PROMPT}", max_new_tokens=8) + "\n"
    assert done.stdout == re.sub("[“”]", '"', text).encode("ascii", "backslashreplace").decode()
    (note,) = re.findall("^keras-vaultgemma: (.*)$", done.stderr, re.M)
    others = " or ".join(name for name in backend.BACKENDS if name != backend.NAME)
    assert note == f"running on {backend.NAME}; set KERAS_BACKEND to {others} for another backend"


def test_an_unknown_backend_is_a_usual_error():
    done = run_command("info", "vaultgemma_tiny", env={"KERAS_BACKEND": "abacus"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "keras-vaultgemma: KERAS_BACKEND must be one of jax, torch, tensorflow. Received: KERAS_BACKEND='abacus'\n"
    )


def test_defaults(capsys, fake_model):
    assert cli.main(["generate", PROMPT]) == 0
    assert capsys.readouterr().out == PROMPT + " A text.\n"
    assert fake_model.folder == presets.cache_home() / "compiled"
    assert fake_model.loaded == ("vaultgemma_tiny", {})
    assert type(fake_model.sampler) is keras_hub.samplers.GreedySampler
    assert (fake_model.inputs, fake_model.max_new_tokens, fake_model.stop) == (PROMPT, 64, [])


def test_options_reach_the_library(fake_model):
    options = ["--preset", "a/folder", "--dtype", "bfloat16", "--chat", "--stop", "END"]
    assert cli.main(["generate", PROMPT, *options, "--stop", "\n\n"]) == 0
    assert fake_model.stop == ["END", "\n\n"]
    assert fake_model.loaded == ("a/folder", {"dtype": "bfloat16"})
    assert fake_model.inputs == [{"role": "user", "content": PROMPT}]


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
def test_samplers(capsys, fake_model, name, sampler, takes):
    values = {"temperature": 0.5, "seed": 3}
    taken = {option: values[option] for option in takes.split()}
    options = [word for option, value in taken.items() for word in (f"--{option}", str(value))]
    assert cli.main(["generate", PROMPT, "--sampler", name, *options]) == 0
    assert type(fake_model.sampler) is sampler
    assert {option: fake_model.sampler.get_config()[option] for option in taken} == taken
    capsys.readouterr()
    for option in values.keys() - taken.keys():
        error = error_of(
            capsys, "generate", PROMPT, "--sampler", name, f"--{option}", str(values[option])
        )
        assert error.startswith(
            f"--{option} has no effect with --sampler {name}, only with random, top_k, top_p"
        )
        assert error.endswith(f"Received: --{option} {values[option]}")


@pytest.mark.parametrize(
    "options, sampler, config",
    [
        ("--temperature 0.5", keras_hub.samplers.RandomSampler, dict(temperature=0.5)),
        ("--top-k 3", keras_hub.samplers.TopKSampler, dict(k=3)),
        ("--top-k 99999", keras_hub.samplers.TopKSampler, dict(k=4096)),
        ("--top-p 0.9 --seed 2", keras_hub.samplers.TopPSampler, dict(p=0.9, seed=2)),
        ("--top-p 0.9 --top-k 5", keras_hub.samplers.TopPSampler, dict(p=0.9, k=5)),
        ("--top-k 3 --temperature 2", keras_hub.samplers.TopKSampler, dict(k=3, temperature=2.0)),
    ],
)
def test_options_choose_the_sampler(fake_model, options, sampler, config):
    assert cli.main(["generate", PROMPT, *options.split()]) == 0
    assert type(fake_model.sampler) is sampler
    assert {name: fake_model.sampler.get_config()[name] for name in config} == config


def test_options_of_generation_and_of_weights(fake_model, monkeypatch):
    calls = []
    fake_model.quantize = calls.append
    monkeypatch.setattr(
        "keras_vaultgemma.lora.adapters.load_adapter",
        lambda model, folder: calls.append((model, folder)),
    )
    options = (
        "--repetition-penalty 1.5 --int8 --preset a/folder --adapter an/adapter --dtype float32"
    )
    assert cli.main(["generate", PROMPT, *options.split()]) == 0
    assert fake_model.options == {"repetition_penalty": 1.5}
    assert calls == ["int8", (fake_model, "an/adapter")]


def test_json(capsys, fake_model):
    assert cli.main(["generate", "ε: once", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.isascii() and out.count("\n") == 1
    expected = dict(prompt="ε: once", text=" A text.", finish_reason="length", new_tokens=2)
    assert json.loads(out) == expected


def test_text_ends_at_the_context(capsys, fake_model, tiny):
    context = tiny.backbone.max_sequence_length
    word = tiny.preprocessor.tokenizer("a")
    assert len(word) == 1 and len(tiny.preprocessor.tokenizer(" a" * 4)) == 4
    assert cli.main(["generate", " a" * (context - 3)]) == 0
    assert fake_model.max_new_tokens == 2  # what <bos> and the prompt leave
    capsys.readouterr()
    error = error_of(capsys, "generate", " a" * (context - 1))
    assert error == (
        f"PROMPT must have at most {context - 1} tokens, `<bos>` included, because the model's context has {context}. "
        f"Received: {context} tokens"
    )


def test_pieces_are_written_as_they_come_and_an_interrupt_keeps_them(
    capsys, monkeypatch, fake_model
):
    class Interrupted(list):
        finish_reason = "interrupted"

    written = []
    monkeypatch.setattr(
        cli, "print", lambda *text, **kwargs: written.append("".join(text)), raising=False
    )
    fake_model.stream = lambda *args, **kwargs: Interrupted([" A", " te"])
    assert cli.main(["generate", PROMPT]) == 130
    assert written == [PROMPT, " A", " te", ""]


@pytest.mark.parametrize(
    "piped, prompt", [("one\n", "one"), ("one", "one"), ("one\ntwo\n\n", "one\ntwo\n")]
)
def test_a_piped_prompt_loses_one_line_break(monkeypatch, fake_model, piped, prompt):
    monkeypatch.setattr(sys, "stdin", io.StringIO(piped))
    assert cli.main(["generate"]) == 0
    assert fake_model.inputs == prompt


def test_a_pipe_that_is_not_utf_8(monkeypatch, capsys, fake_model):
    piped = io.TextIOWrapper(io.BytesIO(b"caf\xe9 \xce\xb5\r\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", piped)
    assert cli.main(["generate", "--stop", "x\udcff"]) == 0
    assert (fake_model.inputs, fake_model.stop) == ("caf\ufffd ε", ["x\ufffd"])
    notes = capsys.readouterr().err.splitlines()
    note = "keras-vaultgemma: {} has bytes that are not UTF-8, read as \ufffd"
    assert notes == [note.format("--stop"), note.format("PROMPT")]


def test_an_argument_is_the_prompt_whatever_is_piped(monkeypatch, fake_model):
    monkeypatch.setattr(sys, "stdin", io.StringIO("piped"))
    assert cli.main(["generate", ""]) == 0
    assert fake_model.inputs == ""


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
            "--to hf --as gemma --dtype bf16 --shard-size 5MB --verify --overwrite",
            dict(
                to="hf",
                architecture="gemma",
                dtype="bf16",
                shard_size="5MB",
                verify=True,
                overwrite=True,
            ),
        ),
    ],
)
def test_convert_calls_the_recipe_and_reports_the_target(capsys, monkeypatch, options, changes):
    calls = {}

    def convert(**kwargs):
        calls.update(kwargs)
        return {"parameter_count": 2754240, "dtype": "bfloat16"}

    monkeypatch.setattr("keras_vaultgemma.recipes.convert.convert", convert)
    assert cli.main(["convert", "from/here", "there", *options.split()]) == 0
    defaults = dict(to="keras", dtype=None, architecture="vaultgemma", shard_size=None)
    defaults |= dict(verify=False, overwrite=False)
    assert calls == dict(source="from/here", target="there", **{**defaults, **changes})
    verified = ", equal to the source" if changes else ""
    assert capsys.readouterr().out == f"there: 2,754,240 parameters in bfloat16{verified}\n"


def test_convert_fails_in_one_line(capsys, tmp_path):
    assert error_of(capsys, "convert", "vaultgemma_tiny", str(tmp_path)).startswith(
        f"{tmp_path} exists. Pass `overwrite"
    )
    assert "argument --to: invalid choice: 'pt'" in error_of(
        capsys, "convert", "x", "y", "--to", "pt"
    )
    command = ["convert", "vaultgemma_tiny", str(tmp_path / "new"), "--to", "hf"]
    error = error_of(capsys, *command, "--shard-size", "big")
    assert error == (
        "`shard_size` must be a positive number of bytes, such as 5000000 or '5GB'. "
        "Received: shard_size='big'"
    )


def test_epsilon_prints_the_report(capsys):
    command = "epsilon --rows 100 --batch 50 --epochs 2 --noise 5"
    assert cli.main(command.split()) == 0
    assert capsys.readouterr().out == privacy_budget(100, 50, 2, noise_multiplier=5.0) + "\n"


def test_epsilon_calls_the_recipe(capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "keras_vaultgemma.recipes.privacy_budget.privacy_budget",
        lambda **kwargs: calls.append(kwargs) or "the answer",
    )
    command = "epsilon --rows 500 --batch 50 --epochs 2 --epsilon 5 --delta 1e-3 --png a.png"
    assert cli.main(command.split()) == 0
    plan = dict(rows=500, batch_size=50, epochs=2, preset="vaultgemma_tiny")
    rest = dict(epsilon=5.0, delta=1e-3, png="a.png", max_rows_per_group=None)
    assert calls == [dict(**plan, noise_multiplier=None, **rest)]
    assert capsys.readouterr().out == "the answer\n"


def test_finetune_calls_the_recipe(capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "keras_vaultgemma.recipes.finetune.finetune",
        lambda **kwargs: calls.append(kwargs) or "the answer",
    )
    defaults = dict(
        data="a.txt", output="finetuned", preset="vaultgemma_tiny", validation=None, text_column=None,
        prompt_column=None, response_column=None, group_column=None, max_rows_per_group=None, packed=None,
        lora_rank=None, lora_targets=None, epochs=None, batch_size=None, learning_rate=None, sequence_length=None, truncate=None,
        dtype=None, gradient_checkpointing=False, merge=False, save_freq=100, seed=0, png=None, private=False,
        epsilon=None, delta=None, noise_multiplier=None, clip_norm=None, extend_budget=False, secure=False,
        report=False, canaries=None,
    )  # fmt: skip
    assert cli.main(["finetune", "--data", "a.txt"]) == 0
    assert capsys.readouterr().out == "the answer\n"
    assert calls == [defaults]

    options = dict(
        data="a.txt", preset="p", validation="v.txt", text_column="t", prompt_column="q", response_column="a",
        group_column="g", max_rows_per_group=2, lora_rank=4, epochs=5, batch_size=2, learning_rate=0.1, sequence_length=9,
        truncate="row_end", dtype="bfloat16", output="o",
        seed=3, png="c.png", epsilon=3.0, delta=1e-5, clip_norm=0.5, canaries=50,
    )  # fmt: skip
    command = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    flags = "--extend-budget --secure --gradient-checkpointing --merge --no-packing --save-every 7 --private --noise 2"
    flags += " --report --lora-targets query gate"
    assert cli.main(["finetune", *command, *flags.split()]) == 0
    flagged = dict(gradient_checkpointing=True, merge=True, packed=False, private=True)
    flagged |= dict(extend_budget=True, secure=True, report=True)
    assert calls[1] == {
        **options,
        **flagged,
        "save_freq": 7,
        "noise_multiplier": 2.0,
        "lora_targets": ["query", "gate"],
    }
    assert calls[1].keys() == defaults.keys()


def test_compare_calls_the_recipe(capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "keras_vaultgemma.recipes.compare.compare",
        lambda **kwargs: calls.append(kwargs) or "the answer",
    )
    options = dict(
        private="p", plain="q", base="b", train="t.csv", held_out="h.csv", canaries="c.json", tasks="piqa",
        include_path="i", limit=5.0, html="page.html", text_column="t", prompt_column=None, response_column=None,
        sequence_length=64, prefix_length=20, suffix_length=10, max_records=100, dtype="bfloat16",
    )  # fmt: skip
    command = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in options.items()
        if value is not None
    ]
    assert cli.main(["compare", *command, "--show-text", "--public-records"]) == 0
    assert calls == [{**options, "show_text": True, "public_records": True}]
    assert capsys.readouterr().out == "the answer\n"
    assert cli.main(["compare", "--private", "p", "--train", "t.csv"]) == 0
    assert calls[1].keys() == calls[0].keys() == inspect.signature(compare).parameters.keys()


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


def test_serve_calls_the_recipe(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "keras_vaultgemma.serving.server.serve", lambda **kwargs: calls.append(kwargs) or ""
    )
    monkeypatch.delenv("KERAS_VAULTGEMMA_API_KEY", raising=False)
    defaults = dict(
        preset=None, adapters=[], dtype=None, quantization=None, host="127.0.0.1", port=8000, api_key=None, allow_hosts=[],
        allow_origins=[], max_rows=8, max_queue=256, timeout=600.0, skip_warm_up=False,
    )  # fmt: skip
    assert cli.main(["serve"]) == 0
    assert calls == [defaults]
    monkeypatch.setenv("KERAS_VAULTGEMMA_API_KEY", "from the environment")
    options = "--adapter a=b --adapter c --host :: --port 0 --allow-host h --allow-origin o --max-rows 2 --skip-warm-up"
    assert cli.main(["serve", *options.split()]) == 0
    changes = dict(
        adapters=["a=b", "c"], host="::", port=0, allow_hosts=["h"], allow_origins=["o"], max_rows=2, skip_warm_up=True,
        api_key="from the environment",
    )  # fmt: skip
    assert calls[1] == {**defaults, **changes}
    assert cli.main(["serve", "--api-key", "given"]) == 0
    assert calls[2]["api_key"] == "given"


@pytest.mark.long
def test_serve_in_a_process_of_its_own(tmp_path):
    """Until it is interrupted."""
    command = [sys.executable, "-m", "keras_vaultgemma", "serve", "--port", "0", "--skip-warm-up"]
    # A shell that runs the tests in the background has them ignore interrupts.
    options = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            line = next(line for line in process.stderr if line.startswith("Listening on "))
            url = line.split()[2].rstrip(":")
            assert "pre-trained only" in next(process.stderr)
            with urllib.request.urlopen(f"{url}/health", timeout=30) as response:
                assert json.load(response)["status"] == "ok"
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        error = error_of(capsys, "serve", "--port", port, "--skip-warm-up")
    assert "Address already in use" in error
