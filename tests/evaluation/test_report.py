"""The comparison page: self-contained, escaped, masked, and honest."""

import html.parser
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from comparison_cases import audit, comparison, membership, memorization
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from keras_vaultgemma.evaluation import report, verdict, wording
from keras_vaultgemma.evaluation.claim import LedgerClaim

pytestmark = pytest.mark.any_backend

SCHEMAS = Path(report.__file__).parent / "schemas"
NO_CLAIM = LedgerClaim("none", "The model has no privacy ledger").as_dict()


class Text(html.parser.HTMLParser):
    """The text of a page, and its tags, which must be balanced."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.parts, self.links = set(), [], [], []
        self.feed(page)
        assert not self.open
        self.text = re.sub(r"\s+", " ", " ".join(self.parts))

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [x for name, x in attributes if name in ("href", "src", "srcset", "action")]
        if tag not in ("meta", "circle", "line", "rect", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.parts.append(data)


def text_of(found):
    return Text(report.render(found)).text


def test_the_page_is_self_contained():
    page = report.render(comparison())
    found = Text(page)
    assert all(link.startswith("#") for link in found.links)
    assert not found.tags & {"script", "link", "img", "iframe", "object"}
    assert "url(" not in page and "@import" not in page and "://" not in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        element = ElementTree.fromstring(svg)
        assert element.tag == "svg" and (
            element.get("aria-label") or element.get("viewBox") == "0 0 12 12"
        )
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_everything_from_data_is_escaped():
    evil = "<script>alert('x')</script>\"&"
    found = comparison(
        name=evil,
        notes=[evil],
        claim={
            **comparison()["claim"],
            "unit": evil,
            "mechanism": evil,
            "statements": [{"epsilon": evil, "unit": evil}],
        },
        closest={"private": [{"record": 1, "distance": 0.1, "text": evil}]},
        tasks={
            "base": {"tasks": {evil: {"metrics": {evil: {"value": 0.5, "standard_error": None}}}}}
        },
    )
    found["models"]["private"]["adapter"] = evil
    page = report.render(found)
    assert "<script" not in page and "alert('x')" not in page
    assert text_of(found).count(evil) >= 7


def test_the_claim_and_the_measurements():
    text = text_of(comparison())
    for words in (
        "ε = 7.9 at δ = 10⁻⁵ for one row of at most 64 tokens",
        "tells which is which in at most 80 of 100 cases",
        "Claim, not contradicted by measurement",
        "of its training records the model repeats none of 200 word for word (at most 1.5 % with 95 % confidence); the plain model 12 of 200",
        "Private training brings 50 % of what plain training brings",
        "does not contradict the claim: it shows that ε is at least 0.4, and the claim is at most 7.9",
        "EDPB Opinion 28/2024",
        "NIST SP 800-226",
        "the claim is about them",
        "0123456789abcdef",
    ):
        assert words in text, words


def test_unprotected_figures_are_marked():
    assert "Privacy evaluation: dialogues Not for publication." in text_of(comparison())
    assert "Not for publication" not in text_of(comparison(unprotected=None))
    for name in ("a/report.html", "a/report.unprotected.html", "a/report"):
        assert report.page_path(name, False) == Path("a/report.unprotected.html")
    assert report.page_path("a/report.html", True) == Path("a/report.html")


def test_text_is_masked_unless_asked_for():
    assert report.MASK in text_of(comparison())
    shown = comparison(closest={"private": [{"record": 1, "distance": 0.1, "text": "a secret"}]})
    text = text_of(shown)
    assert "a secret" in text and "TEXT OF PRIVATE RECORDS IS SHOWN" in text


def test_no_claim_without_a_ledger():
    found = comparison(claim=NO_CLAIM, audit={})
    assert found["verdict"]["status"] == "none"
    text = text_of(found)
    assert "No claim. The model has no privacy ledger." in text
    assert "no statement about how it was trained" in text
    assert "claimed: at most" not in text and "the most that the claim allows" not in text
    assert "No audit was made" in text
    assert verdict.summary(found)[0] == "No claim: The model has no privacy ledger"


def test_few_records_are_no_claim():
    found = comparison(
        memorization={"private": memorization(0, total=20)},
        membership={"private": membership(0.0, total=20)},
    )
    assert found["verdict"]["stamp"] == "Claim, tested on too few records"
    assert "Fewer than 30 records were tested. Intervals are given" in text_of(found)


def test_a_condition_and_other_records():
    claim = {
        **comparison()["claim"],
        "status": "conditional",
        "reason": "It does not cover 7 steps",
    }
    assert "The claim has a condition. It does not cover 7 steps." in text_of(
        comparison(claim=claim)
    )
    other = comparison(claim={**comparison()["claim"], "data_match": "no"})
    text = text_of(other)
    assert "The ledger is about other records" in text and "claimed: at most 80" not in text


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"audit": {"private": audit(9.1, 7.9)}},
            "The audit shows that ε is at least 9.1, and the claim is at most 7.9",
        ),
        ({"membership": {"private": membership(3.0)}}, "pairs apart, and the claim allows 80"),
    ],
)
def test_a_contradiction_stands_at_the_top(changes, words):
    found = comparison(**changes)
    assert found["verdict"]["status"] == "contradicted"
    text = text_of(found)
    assert words in text[:600] and "Claim in doubt" in text
    assert words in " ".join(verdict.summary(found))


def test_records_of_two_kinds_are_no_contradiction():
    measured = membership(3.0)
    measured["shift"]["is_found"] = True
    found = comparison(membership={"private": measured})
    assert found["verdict"]["status"] != "contradicted"
    words = "Training and unseen records differ without any model"
    assert words in text_of(found) and words in " ".join(verdict.summary(found))


def test_what_was_not_measured():
    found = comparison(
        memorization={}, membership={}, audit={}, closest={}, notes=["No record is long enough"]
    )
    text = text_of(found)
    assert "Claim, not tested by measurement" in text and "No record is long enough" in text
    without_plain = comparison(
        **{
            name: {k: x for k, x in comparison()[name].items() if k != "plain"}
            for name in ("models", "likelihood", "memorization", "membership", "audit", "closest")
        }
    )
    text = text_of(without_plain)
    assert "lain training" not in text and "2.000 bits per byte after private training" in text


def test_a_model_that_diverged():
    likelihood = comparison()["likelihood"]
    likelihood["plain"] |= {"bits_per_byte": None, "perplexity": None}
    text = text_of(comparison(likelihood=likelihood))
    assert "The model diverged: plain training." in text and "not finite" in text


def test_files_and_their_schema(tmp_path):
    found = comparison(
        tasks={
            "base": {
                "tasks": {},
                "unavailable": {},
                "pairs": 1,
                "truncated": 0,
                "truncation": "keep_bos",
                "harness": "0.4.13",
            }
        }
    )
    written = report.write_report(found, tmp_path / "page.unprotected.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "page.unprotected.html",
        "page.unprotected.json",
    ]
    assert len(written) == 2
    saved = json.loads((tmp_path / "page.unprotected.json").read_text(encoding="utf-8"))
    assert saved == found
    check(saved)
    assert list(saved)[1] == "unprotected"
    check(comparison(claim=NO_CLAIM, audit={}, memorization={}, membership={}, closest={}))


def check(found):
    """Validate a comparison, with the schemas that it refers to."""
    schemas = {path.name: json.loads(path.read_text()) for path in SCHEMAS.glob("*.json")}
    registry = Registry().with_resources(
        (name, Resource.from_contents(schema)) for name, schema in schemas.items()
    )
    Draft202012Validator(schemas["comparison.json"], registry=registry).validate(found)


def test_numbers_in_words():
    assert wording.power(1e-5) == "10⁻⁵" and wording.power(1.26e-10) == "1.3 × 10⁻¹⁰"
    assert wording.power(0.01) == "0.01"
    assert wording.percent(0.0025) == "0.25 %" and wording.percent(0.1234) == "12.3 %"
    assert wording.percent(1.0) == "100 %" and wording.percent(0.000001) == "0.0001 %"
    assert wording.percent(0.0) == "0 %"
    assert wording.strength(0.5) != wording.strength(8.0) != wording.strength(12.0)
