"""From a data file to an adapter or a preset."""

import importlib.util
import json
import re
import sys

import keras
import numpy as np
import pytest
from common import LINES, one_layer_preset, to_numpy

from keras_vaultgemma import VaultGemmaCausalLM, backend, finetune
from keras_vaultgemma.data import text_files
from keras_vaultgemma.evaluation.likelihood import measure
from keras_vaultgemma.lora import adapters
from keras_vaultgemma.recipes import finetune as recipe
from keras_vaultgemma.training.checkpoint import FILE

pytestmark = [
    pytest.mark.first_backend,
    pytest.mark.filterwarnings("ignore:.*rows are too few for this budget"),
]

TEXTS = [f"{line} The end of tale {i}." for i in range(3) for line in LINES]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("\n\n".join(TEXTS))
    return path


def run(data, output, **options):
    defaults = {"preset": one_layer_preset(), "epochs": 2, "batch_size": 2, "sequence_length": 32}
    return finetune(data, output, **{**defaults, **options})


def report(folder):
    return json.loads((folder / "run.json").read_text())


def measured(model, data):
    _, unseen = text_files.read_records(data).split()
    model.preprocessor.sequence_length = 32
    return measure(model, **unseen.tokenize(model.preprocessor, packed=True))


@pytest.mark.every_backend
def test_an_adapter(data, tmp_path):
    output = tmp_path / "run"
    text = run(data, output, epochs=4)
    figures = report(output)
    assert figures["after"]["bits_per_byte"] < 0.95 * figures["before"]["bits_per_byte"]
    assert figures["after"]["perplexity"] < figures["before"]["perplexity"]
    assert figures["history"]["loss"][-1] < figures["history"]["loss"][0]
    assert len(figures["history"]["val_loss"]) == len(figures["history"]["tokens_per_second"]) == 4
    assert sorted(path.name for path in output.iterdir()) == [
        "adapter",
        "checkpoint",
        "curves.png",
        "run.json",
    ]

    model = VaultGemmaCausalLM.from_preset(one_layer_preset())
    before = measured(model, data)
    adapters.load_adapter(model, output / "adapter")
    after = measured(model, data)
    assert figures["before"]["nats"] == pytest.approx(before.nats, rel=1e-5)
    assert figures["after"]["nats"] == pytest.approx(after.nats, rel=1e-5)
    assert text.splitlines() == [
        f"{one_layer_preset()} on {data}: 11 rows to train on, 1 held out",
        f"Held out, before: {before}",
        f"Held out, after:  {after}",
        f"{output}/adapter: for lora.load_adapter(model, folder)",
        f"{output}/curves.png: the curves",
    ]


@pytest.mark.parametrize("options", [{"lora_rank": 0}, {"merge": True}], ids=["full", "merged"])
def test_a_preset(data, tmp_path, options):
    output = tmp_path / "run"
    text = run(data, output, **options)
    assert f"{output}/preset: for from_preset" in text and not (output / "adapter").exists()
    after = report(output)["after"]
    assert after["bits_per_byte"] < report(output)["before"]["bits_per_byte"]
    model = VaultGemmaCausalLM.from_preset(output / "preset")
    assert measured(model, data).nats == pytest.approx(after["nats"], rel=1e-5)


def test_pairs_and_a_file_of_held_out_ones(tmp_path):
    for name, answers in (("data", ["yes", "no"] * 6), ("unseen", ["yes"])):
        records = [
            {"question": f"Is it {i}?", "answer": answer} for i, answer in enumerate(answers)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    columns = {"prompt_column": "question", "response_column": "answer"}
    text = run(
        tmp_path / "data.jsonl", tmp_path / "run", validation=tmp_path / "unseen.jsonl", **columns
    )
    assert "12 rows to train on, 1 held out" in text
    assert report(tmp_path / "run")["before"]["bytes"] == 3


def test_data_in_memory(tmp_path):
    """Texts in a table, and chats, give what a file gives; `run.json` has no data."""
    chats = [
        [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": t}] for t in TEXTS
    ]
    for name, rows in (
        ("texts", [{"text": text, "id": i} for i, text in enumerate(TEXTS)]),
        ("chats", [{"messages": chat} for chat in chats]),
    ):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        options = dict(epochs=1, sequence_length=64)
        text = run(rows, tmp_path / f"{name} in memory", validation=rows[:1], **options)
        other = run(path, tmp_path / name, validation=rows[:1], **options)
        assert "on a list in memory: 12 rows to train on, 1 held out" in text
        assert text.splitlines()[1:3] == other.splitlines()[1:3]
        options = report(tmp_path / f"{name} in memory")["options"]
        assert options["data"] == options["validation"] == "a list in memory"


def test_blank_rows_are_counted(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "a tale\n" * 4 + " \n" * 2)
    assert "3 rows to train on, 1 held out, 2 blank ones left out" in run(
        tmp_path / "a.csv", tmp_path / "run", epochs=1
    )


class Interrupt(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if int(to_numpy(self.model.optimizer.iterations)) >= 5:
            raise InterruptedError


def factors(folder):
    model = VaultGemmaCausalLM.from_preset(one_layer_preset())
    adapters.load_adapter(model, folder / "adapter")
    return {v.path: to_numpy(v) for v in model.trainable_variables}


def test_a_killed_run_goes_on(data, tmp_path, monkeypatch):
    run(data, tmp_path / "whole", save_freq=2)
    checkpoint = recipe.TrainingCheckpoint
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(recipe, "TrainingCheckpoint", lambda *args: [checkpoint(*args), Interrupt()])
        run(data, tmp_path / "broken", save_freq=2)
    assert sorted(path.name for path in (tmp_path / "broken").iterdir()) == [
        "checkpoint",
        "run.json",
    ]
    run(data, tmp_path / "broken", save_freq=2)
    expected = factors(tmp_path / "whole")
    for path, value in factors(tmp_path / "broken").items():
        np.testing.assert_allclose(
            value, expected[path], rtol=0, atol=0 if backend.NAME == "jax" else 1e-6
        )
    losses = [report(tmp_path / name)["history"]["loss"] for name in ("whole", "broken")]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_more_epochs_and_other_options(data, tmp_path):
    run(data, tmp_path / "run", epochs=1)
    before = report(tmp_path / "run")["before"]
    run(data, tmp_path / "run", epochs=2)
    assert (
        len(report(tmp_path / "run")["history"]["loss"]) == 2
        and report(tmp_path / "run")["before"] == before
    )
    with pytest.raises(
        ValueError, match="has a run with learning_rate=None. Received: learning_rate=0.5"
    ):
        run(data, tmp_path / "run", learning_rate=0.5)
    data.write_text("\n\n".join(TEXTS[::-1]))
    with pytest.raises(ValueError, match="belongs to another run: its data had SHA-256"):
        run(data, tmp_path / "run")


@pytest.mark.filterwarnings("ignore:.*rows were longer")
def test_a_private_run(data, tmp_path, monkeypatch):
    """It keeps to its budget, says so, and the ledger comes with the adapter."""
    monkeypatch.setenv("KERAS_VAULTGEMMA_HOME", str(tmp_path / "home"))
    options = dict(private=True, epsilon=3.0, delta=1e-3, batch_size=4)
    text = run(data, tmp_path / "run", **options)
    (line,) = [line for line in text.splitlines() if line.startswith("Private")]
    assert (
        line.endswith("zero-out neighbours); metrics are not covered")
        and "one row of at most 32 tokens" in line
    )
    model = VaultGemmaCausalLM.from_preset(one_layer_preset())
    adapters.load_adapter(model, tmp_path / "run" / "adapter")
    spent = model.privacy.spent()
    assert (
        2.9 < spent.epsilon <= 3.0
        and spent.steps == 2 * 3
        and f"ε = {spent.epsilon:g} at δ = 0.001" in line
    )
    assert {"unprotected_loss", "epsilon"} < report(tmp_path / "run")["history"].keys()
    assert "val_loss" not in report(tmp_path / "run")["history"]
    assert "No guarantee covers them" in report(tmp_path / "run")["unprotected"]
    # The same rows, cut elsewhere, are the same rows: both runs together are what counts.
    options["sequence_length"] = 16
    with pytest.raises(ValueError, match="budget for these rows is used up"):
        run(data, tmp_path / "other", **options)
    lines = (tmp_path / "run" / "adapter" / "privacy_ledger.jsonl").read_text().splitlines()
    fingerprint = json.loads(lines[0])["dataset"]
    with pytest.warns(UserWarning, match="Earlier private runs on this machine"):
        text = run(data, tmp_path / "other", **options, extend_budget=True)
    assert "For a person whose record was in all 2 private runs that this machine knows" in text
    lines = (tmp_path / "other" / "adapter" / "privacy_ledger.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["dataset"] == fingerprint


def test_users_instead_of_rows(tmp_path, monkeypatch, capsys):
    """The column says whose rows they are: a third of the users' rows takes part, and no user is in both parts."""
    monkeypatch.setenv("KERAS_VAULTGEMMA_HOME", str(tmp_path / "home"))
    records = [{"text": f"{i} {LINES[i % 4]}", "patient_id": i % 11} for i in range(33)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    options = dict(private=True, noise_multiplier=3.0, delta=1e-3, batch_size=4, epochs=1)
    options |= dict(group_column="patient_id", max_rows_per_group=2, sequence_length=128)
    text = run(data, tmp_path / "run", **options)
    advice = capsys.readouterr().err
    assert "none has more than 32: sequence_length=32 makes steps shorter" in advice
    assert "30 rows of 10 users to train on, 3 held out" in text
    assert "for one user of at most 2 rows of at most 128 tokens, after 3 steps" in text
    (line,) = [line for line in text.splitlines() if "group privacy" in line]
    model = VaultGemmaCausalLM.from_preset(one_layer_preset())
    adapters.load_adapter(model, tmp_path / "run" / "adapter")
    (used, _), spent = model.privacy.ledger.runs[0], model.privacy.spent()
    assert used.rows == 10 and spent.unit in text
    by_row = float(re.search("with 2 rows an ε of ([0-9.]+) at δ = 0.001", line).group(1))
    assert 1.5 * spent.epsilon < by_row < 4 * spent.epsilon


@pytest.mark.filterwarnings("ignore:.*rows were longer")
@pytest.mark.parametrize(
    "written", [False, True], ids=["in the middle", "before anything is written"]
)
def test_a_private_run_that_is_killed(data, tmp_path, monkeypatch, written):
    """It goes on and keeps to its budget; after its last step it has the adapter to write and nothing else to do."""
    monkeypatch.setenv("KERAS_VAULTGEMMA_HOME", str(tmp_path / "home"))
    options = dict(private=True, epsilon=3.0, delta=1e-3, batch_size=4, save_freq=1)
    checkpoint, steps = recipe.TrainingCheckpoint, 2 * 3

    def interrupted(*args):
        raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        if written:
            patch.setattr(recipe, "finish_run", interrupted)
        else:
            patch.setattr(
                recipe, "TrainingCheckpoint", lambda *args: [checkpoint(*args), Interrupt()]
            )
        run(data, tmp_path / "run", **options)
    assert not (tmp_path / "run" / "adapter").exists()
    text = run(data, tmp_path / "run", **options)
    model = VaultGemmaCausalLM.from_preset(one_layer_preset())
    adapters.load_adapter(model, tmp_path / "run" / "adapter")
    spent = model.privacy.spent()
    # Killed in step 5 after step 4 was saved: two steps are done after that, of which one is done again.
    assert spent.steps == (steps if written else steps + 1) and 2.9 < spent.epsilon <= 3.0
    assert f"ε = {spent.epsilon:g} at δ = 0.001" in text
    assert len(report(tmp_path / "run")["history"]["epsilon"]) == 2


def test_a_loss_that_is_not_finite(data, tmp_path, monkeypatch):
    """Training stops; what was learnt until then is saved and the error says which batch is to blame."""
    fit = VaultGemmaCausalLM.fit

    def with_a_bad_weight(self, **kwargs):
        kwargs["sample_weight"] = kwargs["sample_weight"].astype("float32")
        kwargs["sample_weight"][7, 3] = np.nan
        return fit(self, **kwargs)

    monkeypatch.setattr(VaultGemmaCausalLM, "fit", with_a_bad_weight)
    with (
        pytest.warns(UserWarning, match="the loss is nan"),
        pytest.raises(FloatingPointError) as error,
    ):
        run(data, tmp_path / "run")
    assert "Epoch 1, batch " in str(error.value) and "are restored to their state before it" in str(
        error.value
    )
    assert str(error.value).endswith(f"These are in {tmp_path}/run/adapter")
    assert all(np.isfinite(value).all() for value in factors(tmp_path / "run").values())
    assert report(tmp_path / "run")["after"]["bits_per_byte"] > 0
    assert FILE in [path.name for path in (tmp_path / "run" / "checkpoint").iterdir()]


def test_pictures(data, tmp_path, monkeypatch):
    text = run(data, tmp_path / "a", epochs=1, png=tmp_path / "b" / "loss.png")
    assert text.endswith(f"{tmp_path}/b/loss.png: the curves")
    assert (tmp_path / "b" / "loss.png").stat().st_size > 10_000 and not (
        tmp_path / "a" / "curves.png"
    ).exists()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = run(data, tmp_path / "a", epochs=1)
    assert text.endswith("No curves: pip install 'keras-vaultgemma[plot]' for a plot of them")
    monkeypatch.setattr(recipe, "read_records", lambda *args: pytest.fail("worked first"))
    with pytest.raises(ImportError, match=r"keras-vaultgemma\[plot\]"):
        run(data, tmp_path / "c", png="c.png")


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"lora_rank": -1},
            "`lora_rank` must be None or an integer of at least 0. Received: lora_rank=-1",
        ),
        (
            {"learning_rate": 0.0},
            "`learning_rate` must be None or a finite number above 0. Received: learning_rate=0.0",
        ),
        (
            {"learning_rate": float("nan")},
            "`learning_rate` must be None or a finite number above 0. Received: learning_rate=nan",
        ),
        ({"epochs": 0}, "`epochs` must be None or a positive integer. Received: epochs=0"),
        (
            {"batch_size": 0},
            "`batch_size` must be None or a positive integer. Received: batch_size=0",
        ),
        (
            {"sequence_length": 0},
            "`sequence_length` must be None or a positive integer. Received: sequence_length=0",
        ),
        (
            {"save_freq": 0},
            "`save_freq` must be 'epoch' or a positive integer. Received: save_freq=0",
        ),
        ({"seed": -1}, "`seed` must be an integer from 0 to 2147483647. Received: seed=-1"),
        ({"epsilon": 3.0}, "`epsilon` goes with private=True"),
        ({"group_column": "id"}, "`group_column` goes with private=True"),
        (
            {"private": True, "epsilon": 3.0, "max_rows_per_group": 2},
            "`max_rows_per_group` goes with `group_column`. Received: max_rows_per_group=2",
        ),
        ({"private": True, "epsilon": 3.0, "group_column": "id"}, "has no columns"),
        ({"private": True}, "Exactly one of `epsilon` and `noise_multiplier` must be given"),
        ({"private": True, "epsilon": 3.0, "packed": True}, "documents in a row"),
        ({"lora_rank": 0, "merge": True}, "`merge` needs an adapter. Received: lora_rank=0"),
        ({"text_column": "text"}, "has no columns"),
        ({"preset": "nowhere"}, "`preset` must be a bundled preset"),
        ({"lora_rank": 0, "dtype": "bfloat16"}, "float32 weights to train"),
    ],
)
def test_bad_options(data, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(data, tmp_path / "run", **options)


def test_pairs_longer_than_a_row_warn_once(tmp_path):
    """The prompts are cut, in training and held-out rows together, and every answer is learned."""
    rows = [{"prompt": LINES[i % 4] * 2, "response": f"It was {i}."} for i in range(12)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match="sequence_length") as caught:
        run(path, tmp_path / "run", epochs=1)
    assert [str(w.message) for w in caught if "rows" in str(w.message)] == [
        "12 of 12 rows were longer than sequence_length=32 and were truncated."
    ]
