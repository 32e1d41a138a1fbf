"""The command line: parsing, output and errors. tests/recipes/test_commands.py covers each command."""

import os
import sys
from types import SimpleNamespace

import pytest
from common import error_of

import keras_vaultgemma
from keras_vaultgemma import cli

pytestmark = [pytest.mark.any_backend, pytest.mark.usefixtures("no_cache")]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "the following arguments are required: COMMAND (see keras-vaultgemma --help)"),
        ("sing", "argument COMMAND: invalid choice: 'sing'"),
        ("info", "the following arguments are required: PRESET (see keras-vaultgemma info --help)"),
        (
            "generate x --max-new-tokens many",
            "argument --max-new-tokens: invalid int value: 'many'",
        ),
        (
            "generate x --max-new-tokens 0",
            "`max_new_tokens` must be None or a positive integer. Received: max_new_tokens=0",
        ),
        ("generate x --max 3", "unrecognized arguments: --max 3"),
        ("generate x --dtype float31", "argument --dtype: invalid choice: 'float31'"),
        ("generate x --sampler oracle", "argument --sampler: invalid choice: 'oracle'"),
        (
            "generate x --sampler beam --temperature 0",
            "--temperature must be a number above 0. Received: 0.0",
        ),
        (
            "generate x --sampler beam --temperature nan",
            "--temperature must be a number above 0. Received: nan",
        ),
        (
            "generate x --sampler beam --temperature inf",
            "--temperature must be a number above 0. Received: inf",
        ),
        (
            "generate x --sampler top_k --seed -1",
            "--seed must be from 0 to 2147483647. Received: -1",
        ),
        (
            "generate x --sampler top_k --seed 2147483648",
            "--seed must be from 0 to 2147483647. Received: 2147483648",
        ),
        ("generate x --top-k 0", "--top-k must be a positive integer. Received: 0"),
        (
            "generate x --top-p 1.5",
            "--top-p must be a number above 0 and at most 1. Received: 1.5",
        ),
        (
            "generate x --sampler random --top-k 3",
            "--top-k has no effect with --sampler random, only with top_k, top_p. Received: --top-k 3",
        ),
        (
            "generate x --preset nowhere",
            "`preset` must be a bundled preset (vaultgemma_1b, vaultgemma_tiny), a folder",
        ),
        (
            "epsilon --batch 10 --epochs 1",
            "the following arguments are required: --rows (see keras-vaultgemma epsilon --help)",
        ),
        ("epsilon --rows x --batch 10 --epochs 1", "argument --rows: invalid int value: 'x'"),
        (
            "epsilon --rows 100 --batch 10 --epochs 1",
            "Exactly one of `epsilon` and `noise_multiplier` must be given.",
        ),
        (
            "epsilon --rows 100 --batch 10 --epochs 1 --noise 1 --delta 2",
            "`delta` must be a number above 0 and below 1.",
        ),
        (
            "finetune",
            "the following arguments are required: --data (see keras-vaultgemma finetune --help)",
        ),
        (
            "finetune --data a.pdf",
            "Data must be a file named .txt, .jsonl, .json, .csv, .tsv, or a table",
        ),
        ("finetune --data nowhere.csv", "[Errno 2] No such file or directory: 'nowhere.csv'"),
        (
            "finetune --data a.csv --lora-rank -1",
            "`lora_rank` must be None or an integer of at least 0. Received: lora_rank=-1",
        ),
        (
            "evaluate --data a.pdf",
            "Data must be a file named .txt, .jsonl, .json, .csv, .tsv, or a table",
        ),
        ("evaluate", "Name either --data FILE or --tasks NAMES, and not both"),
        ("evaluate --tasks piqa --data a.txt", "Name either --data FILE or --tasks NAMES"),
        ("evaluate --data a.txt --num-fewshot 0", "--num-fewshot has an effect only with --tasks"),
        ("evaluate --tasks piqa --text-column a", "--text-column has an effect only with --data"),
        (
            "evaluate --data a.txt --sequence-length 0",
            "`sequence_length` must be None or a positive integer. Received: sequence_length=0",
        ),
        (
            "info nowhere",
            "`preset` must be a bundled preset (vaultgemma_1b, vaultgemma_tiny), a folder",
        ),
    ],
)
def test_errors(capsys, arguments, message):
    assert error_of(capsys, *arguments.split()).startswith(message)


@pytest.mark.parametrize(
    "words, prompt, changes",
    [
        (["-5 degrees"], "-5 degrees", {}),
        (["-how are you"], "-how are you", {}),
        (["-Hello"], "-Hello", {}),
        (["-5"], "-5", {}),
        (["-"], "-", {}),
        (["---"], "---", {}),
        (["--- a title\nText"], "--- a title\nText", {}),
        (["--", "--chat"], "--chat", {}),
        (["--chat", "-Hello", "--seed", "3"], "-Hello", dict(chat=True, seed=3)),
        (["--seed=3", "- one", "--chat"], "- one", dict(chat=True, seed=3)),
        (["--stop", "- x", "--stop", "-hx", "Once"], "Once", dict(stop=["- x", "-hx"])),
        (["Once", "--stop", ""], "Once", dict(stop=[""])),
        ([""], "", {}),
        (["--chat"], None, dict(chat=True)),
    ],
)
def test_a_prompt_may_begin_with_a_dash(monkeypatch, words, prompt, changes):
    parsed = {}

    def run(options):
        parsed.update(vars(options))
        return ""

    monkeypatch.setitem(cli.COMMANDS, "generate", cli.COMMANDS["generate"]._replace(run=run))
    assert cli.main(["generate", *words]) == 0
    assert parsed["prompt"] == prompt
    assert {name: parsed[name] for name in changes} == changes


@pytest.mark.parametrize(
    "words, message",
    [
        (["--sampelr", "greedy", "x"], "unrecognized arguments: --sampelr"),
        (["-one", "-two"], "unrecognized arguments: -two"),
        (["Once", "--stop", "--chat"], "argument --stop: expected one argument"),
        (["Once", "--temperature 0.5"], "unrecognized arguments: --temperature 0.5"),
    ],
)
def test_a_misspelt_option_is_no_prompt(capsys, words, message):
    assert error_of(capsys, "generate", *words).startswith(message)


def make_info_fail(monkeypatch, error):
    def fail(options):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "info", cli.COMMANDS["info"]._replace(run=fail))


@pytest.mark.parametrize(
    "error, message",
    [
        (FileNotFoundError("Three ways:\n1. one\n   indented\n\n"), "Three ways: 1. one indented"),
        (ValueError(""), "ValueError"),
        (KeyError("name"), "KeyError: 'name'"),
        (RuntimeError("out of memory"), "RuntimeError: out of memory"),
        (ValueError("a" * 1500 + "b" * 1500), "a" * 1000 + " [...] " + "b" * 1000),
    ],
)
def test_any_error_is_one_line(monkeypatch, capsys, error, message):
    make_info_fail(monkeypatch, error)
    assert error_of(capsys, "info", "x") == message


def test_development_mode_shows_the_traceback(monkeypatch):
    make_info_fail(monkeypatch, ValueError("inside"))
    streams = {name: getattr(sys, name) for name in ("stdin", "stdout", "stderr")}
    monkeypatch.setattr(
        cli, "sys", SimpleNamespace(flags=SimpleNamespace(dev_mode=True), **streams)
    )
    with pytest.raises(ValueError, match="inside"):
        cli.main(["info", "x"])


def test_an_interrupt_is_quiet(monkeypatch, capsys):
    make_info_fail(monkeypatch, KeyboardInterrupt())
    assert cli.main(["info", "x"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_closed_pipe_is_quiet(monkeypatch, capsys):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main(["info", "vaultgemma_1b"]) == 141
    assert capsys.readouterr().err == ""


def test_prints_of_a_command_go_to_standard_error(monkeypatch, capsys):
    def run(options):
        print("Loading…")
        return "the text"

    monkeypatch.setitem(cli.COMMANDS, "info", cli.COMMANDS["info"]._replace(run=run))
    assert cli.main(["info", "x"]) == 0
    assert capsys.readouterr() == ("the text\n", "Loading…\n")


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"keras-vaultgemma {keras_vaultgemma.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in cli.COMMANDS)])
def test_help(capsys, arguments):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: keras-vaultgemma")
    commands = cli.COMMANDS if arguments == ["--help"] else [arguments[0]]
    for name in commands:
        assert name in out
    for option in cli.COMMANDS[arguments[0]].options if arguments[0] in cli.COMMANDS else ():
        assert (option if option.startswith("-") else option.upper()) in out


def test_tasks_without_the_harness_name_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    message = "Tasks need lm-evaluation-harness: pip install 'keras-vaultgemma[eval]'"
    assert error_of(capsys, "evaluate", "vaultgemma_tiny", "--tasks", "piqa").startswith(message)
