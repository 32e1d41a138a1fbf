"""Sentences of the comparison page: numbers in words, and texts that do not depend on a model."""

import math

TITLES = {
    "base": "before training",
    "plain": "plain training",
    "private": "private training",
}

ATTACKS = {
    "loss": "Likelihood of the record",
    "min_k": "Its least likely words (min-k %)",
    "min_k_plus_plus": "The same, standardised (min-k++)",
    "zlib": "Likelihood against compressibility (zlib)",
    "reference": "Likelihood against the model before training",
}

UNPROTECTED = (
    "The measurements in sections 3 to 6 were computed on private records without protection. The "
    "claim covers the model, and not this page: do not publish it with the model."
)

STRENGTHS = (
    (1.0, "An ε of at most 1 is generally taken for strong protection"),
    (10.0, "An ε above 1 and up to 10 is generally taken for reasonable protection"),
    (
        float("inf"),
        "An ε above 10 is generally taken for weak protection or none, so that the measurements "
        "below have to carry the assessment",
    ),
)
"""Tiers of Ponomareva et al., 2023, https://arxiv.org/abs/2303.00654."""


def strength(epsilon: float) -> str:
    """Return what an ε is generally taken for, as a sentence."""
    return next(text for limit, text in STRENGTHS if epsilon <= limit) + "."


def power(number: float) -> str:
    """Return a small number as a multiple of a power of ten: 1.2e-05 as "1.2 × 10⁻⁵"."""
    digits, _, exponent = f"{number:.2g}".partition("e")
    if not exponent:
        return digits
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}" if digits == "1" else f"{digits} × 10{raised}"


def percent(share: float) -> str:
    """Return a share in per cent with two significant digits, or three if it is 10 % or more."""
    value = 100 * share
    digits = f"{value:.3g}" if value >= 9.95 else f"{value:.2g}"
    return f"{digits if 'e' not in digits else f'{value:.4f}'} %"


def fraction(rate: dict) -> str:
    """Return the numerator and denominator of a rate: "none of 1,200", "3 of 1,200"."""
    count = f"{rate['count']:,}" if rate["count"] else "none"
    return f"{count} of {rate['total']:,}"


def bounds(rate: dict) -> str:
    """Return the interval of a rate in words."""
    sure = f"with {100 * rate['confidence']:g} % confidence"
    if not rate["count"]:
        return f"at most {percent(rate['at_most'])} {sure}"
    return f"{percent(rate['low'])} to {percent(rate['high'])} {sure}"


def at_most(share: float) -> int:
    """Return a share in cases of 100, rounded up."""
    return math.ceil(100 * share - 1e-9)


def exclusions(comparison: dict) -> list[tuple[str, str]]:
    """Return pairs of a title and a text about what the claim does not cover."""
    claim, found = comparison["claim"], []
    if claim["status"] == "none":
        found.append(("Everything.", "Without private training there is no claim to limit."))
    elif claim["reason"]:
        found.append(("Training without privacy.", f"{claim['reason']}."))
    if comparison["unprotected"]:
        found.append(
            (
                "The figures on this page.",
                "They were measured on private records, and no noise protects them. They are meant "
                "for those who may see the records.",
            )
        )
    if "plain" in comparison["models"]:
        found.append(
            (
                "The plain model.",
                "It was trained for comparison and without protection. Delete it after the "
                "evaluation, or guard it like the records.",
            )
        )
    if claim["unit"].startswith("one user"):
        several = (
            "Persons with several labels.",
            "The unit is all that stands under one label, up to the number of rows in section 2. "
            "Whoever stands under two labels is protected less.",
        )
    else:
        several = (
            "Persons with several records.",
            "The unit is one record, and not one person. Whoever has several of them is protected "
            "less, the less the more there are.",
        )
    found += [
        several,
        (
            "What many records say.",
            "A fact that stands in many records can be learned and repeated. That is what training "
            "is for, and it can be personal all the same: names of staff, an outbreak, a family.",
        ),
        (
            "Other publications from the same records.",
            "Further models, statistics and answers add up. The software keeps a ledger of private "
            "runs on its machine (keras-vaultgemma ledger) and knows of nothing else.",
        ),
        (
            "What the model knew before.",
            "Text that was in the pre-training is not protected by this training.",
        ),
        (
            "Choices that were made by looking.",
            "Options that somebody chose because earlier results on the same records looked well "
            "have learned from them.",
        ),
        (
            "The machine.",
            "The guarantee is for the finished model, computed by unchanged software with random "
            "numbers of the operating system. It does not cover a thief of the records, of the "
            "checkpoint or of the training logs.",
        ),
    ]
    return found


def annexes(comparison: dict) -> list[dict]:
    """Return the tables of what two guidelines ask for, and where the page answers it."""
    claim = comparison["claim"]
    has_claim = claim["status"] != "none"
    budget = "Section 2: " + (
        f"ε = {claim['epsilon']:g}, δ = {power(claim['delta'])}." if has_claim else "no claim."
    )
    unit = f"Section 2: {claim['unit']}." if has_claim else "None, because there is no claim."
    every = "The claim limits every attack, also unknown ones." if has_claim else ""
    audited = "Section 6." if comparison["audit"] else "Section 6: no audit was made."
    tasks = "Section 3." if comparison["likelihood"] else "Not measured."
    return [
        {
            "title": "EDPB Opinion 28/2024 on AI models, section 3.2: is a model anonymous?",
            "rows": [
                (
                    "Likelihood of direct extraction of training data, probabilistic extraction "
                    "included: insignificant?",
                    "Section 4: greedy and sampled continuations, as an excess with confidence "
                    f"bounds. {every}",
                ),
                (
                    "Likelihood of obtaining personal data from queries, intentionally or not: "
                    "insignificant?",
                    "Section 4 for prompts that are beginnings of records. Other prompts were not "
                    f"tried. {every}",
                ),
                (
                    "Means reasonably likely to be used, by the controller or by others",
                    "The measurements assume an attacker who sees the model's probabilities; a "
                    "claim assumes one who has the model and all other records.",
                ),
                (
                    "Design: sources, preparation and minimisation of data",
                    "Not on this page. Section 7 has the number of records and their fingerprint.",
                ),
                (
                    "Design: methodological choices of training that reduce identifiability",
                    "Section 2: differential privacy, with all its parameters.",
                ),
                (
                    "Design: measures on the outputs of the model",
                    "Not on this page: no filter of outputs was tested.",
                ),
                (
                    "Analysis: internal or external audits of the measures",
                    f"{audited} Section 7 lets others repeat the evaluation.",
                ),
                (
                    "Testing and resistance to attacks: membership inference, regurgitation, "
                    "exfiltration, model inversion, reconstruction, attribute inference",
                    "Section 5: membership inference. Section 4: regurgitation and extraction. Not "
                    "tested: model inversion, and inference of attributes.",
                ),
                (
                    "Documentation: theoretical resistance, metrics, and reports of tests (by "
                    "whom, when, how, with which results)",
                    "This page, its JSON file, and the ledger that is saved with the model. Add "
                    "who made it, and the impact assessment.",
                ),
            ],
        },
        {
            "title": "NIST SP 800-226, Guidelines for Evaluating Differential Privacy Guarantees",
            "rows": [
                ("Privacy loss parameters", budget),
                ("Unit of privacy", unit),
                (
                    "Neighbouring relation and variant of differential privacy",
                    f"Section 2: (ε, δ), {claim['neighbouring']} neighbours."
                    if has_claim
                    else "None.",
                ),
                (
                    "Composition over all releases, and the budget",
                    "Section 2: all runs in the ledger on these data are added up. Section 1 says "
                    "what the ledger cannot know.",
                ),
                (
                    "Algorithm and its correctness",
                    f"Section 2: {claim['mechanism'] or 'none'}. {audited}",
                ),
                ("Utility and accuracy", tasks),
                (
                    "Bias: groups for which the model works worse",
                    "Not measured. Noise and clipping tend to cost small groups most.",
                ),
                (
                    "Trust model",
                    "Central: whoever trains sees all records. The model may then be given away.",
                ),
                (
                    "Implementation: random numbers, floating point, side channels",
                    "Seeds come from the operating system, and the rounding of sums is part of the "
                    "sensitivity. Timing is outside the claim. SECURITY.md of the software has the "
                    "details.",
                ),
                (
                    "Security, access control and exposure of collected data",
                    "Not on this page. Guard the records, the plain model, this page and the file "
                    "of canaries.",
                ),
            ],
        },
    ]


WORDS = (
    (
        "ε (epsilon)",
        "How much more likely any result may become because one record took part: at most by a "
        "factor of e to the power of ε. Smaller is safer.",
    ),
    ("δ (delta)", "The probability that ε does not hold. It should be far below 1 / records."),
    (
        "Bits per byte",
        "Bits in which the model can write down one byte of text it has not seen. The fewer, the "
        "better it knows how such texts go on.",
    ),
    (
        "Pairs told apart (AUC)",
        "Of 100 pairs of a training record and an unseen one, in how many the attack ranks the "
        "training record higher. 50 is chance.",
    ),
    (
        "95 % interval",
        "A range computed so that it contains the true value in 95 of 100 such evaluations "
        "(Clopper-Pearson for counts, bootstrap for AUC).",
    ),
    ("Canary", "An invented record that is put among the data to find out if it can be detected."),
    (
        "Ledger",
        "A file that is saved with the model and lists every step of private training, written "
        "before the step is done.",
    ),
)
