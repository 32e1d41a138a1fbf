"""From models and records to the comparison page, and from training to the page in one call."""

import json

import pytest
from common import one_layer_preset
from test_report import check

from keras_vaultgemma import compare, finetune
from keras_vaultgemma.data.text_files import TextRecords
from keras_vaultgemma.evaluation.tasks import Metric, TaskResult, TaskResults
from keras_vaultgemma.privacy.ledger import read_ledger
from keras_vaultgemma.recipes import compare as recipe
from keras_vaultgemma.recipes import comparison_session
from keras_vaultgemma.recipes.finetune_config import FinetuneConfig

pytestmark = [
    pytest.mark.first_backend,
    pytest.mark.filterwarnings("ignore:.*rows are too few for this budget"),
    pytest.mark.filterwarnings("ignore:.*rows were longer"),
]

RECORDS = [
    f"Patient {i} has had a sore throat for {i % 9} days, and no fever now." for i in range(70)
]
PAGE = "report.unprotected"


def test_from_training_to_the_page_also_after_a_kill(tmp_path, monkeypatch):
    def run():
        return finetune(
            RECORDS,
            tmp_path / "run",
            preset=one_layer_preset(),
            private=True,
            epsilon=8.0,
            epochs=2,
            batch_size=35,
            lora_rank=1,
            sequence_length=16,
            report=True,
            canaries=20,
        )

    def kill(*arguments, **options):
        raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(comparison_session, "audit", kill)
        run()
    parts = tmp_path / "run" / f"{PAGE}.parts"
    ledger = tmp_path / "run" / "adapter" / "privacy_ledger.jsonl"
    steps, stored = sum(count for _, count in read_ledger(ledger).runs), len([*parts.iterdir()])
    canaries = (tmp_path / "run" / "canaries.sealed.json").read_bytes()
    assert stored

    text = run()
    assert not parts.exists()
    assert sum(count for _, count in read_ledger(ledger).runs) == steps
    assert (tmp_path / "run" / "canaries.sealed.json").read_bytes() == canaries
    found = json.loads((tmp_path / "run" / f"{PAGE}.json").read_text(encoding="utf-8"))
    check(found)
    page = (tmp_path / "run" / f"{PAGE}.html").read_text(encoding="utf-8")
    assert not [record for record in RECORDS if record[:20] in page]
    assert "sore throat" not in page + json.dumps(found)
    assert f"{PAGE}.html: the page" in text and "The plain twin, held out" in text

    claim = found["claim"]
    assert (claim["status"], claim["data_match"]) == ("claim", "yes")
    assert claim["steps"] == steps and claim["epsilon"] <= 8.0
    assert found["data"]["train"]["records"] == 63 and found["data"]["held_out"]["records"] == 7
    assert claim["records"] == 63 + found["data"]["train"]["canaries"]
    assert set(found["likelihood"]) == {"base", "plain", "private"}
    assert set(found["audit"]) == {"plain", "private"}
    assert found["audit"]["private"]["canaries"] == 20
    assert found["memorization"]["private"]["members"]["exact"]["total"] > 30
    assert "Fewer than 30 records were tested" in page

    twin = json.loads((tmp_path / "run" / "plain_twin" / "run.json").read_text())
    private = json.loads((tmp_path / "run" / "run.json").read_text())
    same = (
        "preset",
        "epochs",
        "batch_size",
        "learning_rate",
        "lora_rank",
        "lora_targets",
        "sequence_length",
    )
    assert [twin["options"][name] for name in same] == [private["options"][name] for name in same]
    assert not twin["options"]["private"] and twin["options"]["packed"] is False
    assert len(twin["history"]["loss"]) == len(private["history"]["unprotected_loss"])


def test_a_model_without_a_ledger(tmp_path, monkeypatch):
    """Of public records nothing needs protection. Records may be shorter than the prefix."""
    results = TaskResults(
        {"tales": TaskResult({"acc": Metric(0.625, 0.01)}, 0, 8, None)}, {}, 8, 0, "keep_bos", "1"
    )
    monkeypatch.setattr(recipe, "import_lm_eval", lambda: None)
    monkeypatch.setattr(comparison_session, "measure_tasks", lambda *args, **options: results)
    text = compare(
        one_layer_preset(),
        ["A fox.", "", *RECORDS[:4]][2:],
        RECORDS[4:8],
        html=tmp_path / "page.html",
        prefix_length=400,
        sequence_length=16,
        public_records=True,
        tasks="tales",
    )
    assert text.startswith("No claim: The model has no privacy ledger")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "page.json"]
    found = json.loads((tmp_path / "page.json").read_text(encoding="utf-8"))
    check(found)
    assert found["unprotected"] is None and not found["memorization"]
    assert "Repetition was not measured" in found["notes"][0]
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "tales, acc" in page and page.count("62.5 ± 1.0") == 2


@pytest.mark.any_backend
def test_options():
    for options in (
        {"report": True},
        {"canaries": 20},
        {"private": True, "epsilon": 1.0, "canaries": 20},
    ):
        with pytest.raises(ValueError, match="`(report|canaries)` goes with"):
            FinetuneConfig(**options)
    with pytest.raises(ValueError, match="`canaries` must be None or an integer of at least 20"):
        FinetuneConfig(private=True, epsilon=1.0, report=True, canaries=2)


@pytest.mark.any_backend
def test_the_twin_of_a_run_for_users_has_the_same_steps():
    records = TextRecords(["text"] * 60, None, groups=[f"user {i % 20}" for i in range(60)])
    config = FinetuneConfig(private=True, epsilon=1.0, group_column="user", batch_size=5, epochs=2)
    twin = config.plain_twin(records)
    assert (twin.batch_size, twin.epochs) == (15, 2)  # 4 steps of 15 rows, as 4 of 5 users
    assert twin.group_column is None and twin.guarantee() is None and twin.packed is False


@pytest.mark.any_backend
def test_a_missing_package(monkeypatch):
    monkeypatch.setitem(recipe.PACKAGES, "no_such_package", "Nothing")
    with pytest.raises(
        ImportError, match=r"needs Nothing: pip install 'keras-vaultgemma\[report\]'"
    ):
        recipe.compare("vaultgemma_tiny", RECORDS)
