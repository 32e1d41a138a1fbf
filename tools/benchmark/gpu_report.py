"""The results of gpu.py as a Markdown page and as a figure."""

NAMES = {"jax": "JAX", "torch": "PyTorch", "tensorflow": "TensorFlow"}
PEERS = {"peft": "transformers and PEFT", "opacus": "with Opacus"}
COLORS = {
    "ours": "#2a6fbb",
    "ours, private": "#7fb2e5",
    "peer": "#a9a9a9",
    "peer, private": "#d3d3d3",
}
FEW, MANY = "1", "32"
"""Prompts that are decoded together, keys of the results."""


def write(folder, about, results):
    """Write report.md and report.png, or a sentence instead of the figure without matplotlib.

    Args:
        folder: path.
        about: dict of "devices", "tiny", "commit" and "date".
        results: dict from pairs of section and backend to figures or `{"failed": reason}`.
    """
    page = markdown(about, results)
    try:
        draw(results, folder / "report.png")
    except ImportError:
        page += "\nThere is no figure, because matplotlib is not installed.\n"
    unfinished = folder / "report.md.unfinished"
    unfinished.write_text(page, encoding="utf-8")
    unfinished.rename(folder / "report.md")


def markdown(about, results):
    devices = about["devices"]
    found = sorted({d["device"] for d in devices.values() if d["device"]})
    versions = {k: v for d in devices.values() for k, v in d["versions"].items()}
    measured = [about["date"], *[f"commit {about['commit']}"] * bool(about["commit"])]
    measured += [f"{package} {version}" for package, version in versions.items()]
    size = "Tiny sizes, whose times mean nothing" if about["tiny"] else "VaultGemma 1B's size"
    lines = [
        f"# {' and '.join(found) or 'No GPU'}",
        "",
        f"{size}, random weights. {', '.join(measured)}.",
    ]
    lines += [f"\n{d['missing']}" for d in devices.values() if d["missing"]]
    tables = (
        ("Agreement with the CPU", "", correctness_table(results)),
        (
            "Greedy decoding in bfloat16",
            "prompts of 16 tokens, 64 new ones",
            decoding_table(results),
        ),
        ("LoRA steps, bfloat16 base", "32 rows of 256 tokens, rank 8", steps_table(results)),
    )
    for title, sizes, rows in tables:
        if len(rows) > 1:
            sizes = f": {sizes}" if sizes and not about["tiny"] else ""
            lines += ["", f"## {title}{sizes}", "", *as_table(rows)]
    return "\n".join([*lines, ""])


def as_table(rows):
    header, *rest = [f"| {' | '.join(row)} |" for row in rows]
    return [header, "|" + "---|" * len(rows[0]), *rest]


def failure(result, columns):
    """Return the cells of a row that failed."""
    return [f"failed: {result['failed'].replace('|', '/')}", *[""] * (columns - 1)]


def correctness_table(results):
    """Return a row for each check, with its error on each backend."""
    found = {b: r for (section, b), r in results.items() if section == "correctness"}
    checks = list(dict.fromkeys(c for r in found.values() if "failed" not in r for c in r))
    rows = [["relative error", "allowed", *[NAMES[b] for b in found]]]
    for check in checks:
        allowed = next(
            (f"{r[check]['allowed']:g}" for r in found.values() if "allowed" in r.get(check, {})),
            "",
        )
        rows.append([check, allowed, *[_error(r, check) for r in found.values()]])
    if not checks and found:
        rows.append(["all", "", *[failure(r, 1)[0] for r in found.values()]])
    return rows


def _error(result, check):
    verdict = result if "failed" in result else result[check]
    if "failed" in verdict:
        return failure(verdict, 1)[0]
    is_right = verdict["error"] <= verdict["allowed"]
    return f"{verdict['error']:.2g}" if is_right else f"**{verdict['error']:.2g}: too far**"


def decoding(results):
    """Return `{label: result}` of the models that decode."""
    found = {}
    for (section, backend), result in results.items():
        if section == "decode":
            found[f"keras_vaultgemma, {NAMES[backend]}"] = result
        elif section == "decode_transformers":
            found["transformers, PyTorch"] = result
    return found


def decoding_table(results):
    columns = ["tokens/s", "first token, ms", "first call, s", "peak, GB"]
    rows = [["", *[f"{c}, {n} prompt{'s' * (n != FEW)}" for n in (FEW, MANY) for c in columns]]]
    for label, r in decoding(results).items():
        if "failed" in r:
            rows.append([label, *failure(r, 2 * len(columns))])
            continue
        cells = [label]
        for n in (FEW, MANY):
            cells += [f"{r[n]['tokens_per_s']:.1f}", f"{1000 * r[n]['first_token_s']:.1f}"]
            cells += [f"{r[n]['first_call_s']:.1f}", f"{r[n]['peak_gb']:.2f}"]
        rows.append(cells)
    for (section, backend), r in results.items():
        if section == "bandwidth" and "failed" not in r:
            limit = f"{r['gb_per_s']:.0f} GB/s"
            rows.append([f"memory as {NAMES[backend]} reads and writes it", limit, *[""] * 7])
    return rows


def steps(results):
    """Return `{label: (plain, private)}`, each a result or None."""
    found = {
        f"keras_vaultgemma, {name}": (results.get(("plain", b)), results.get(("private", b)))
        for b, name in NAMES.items()
    }
    peers = results.get(("peft", "torch")), results.get(("opacus", "torch"))
    found["transformers, PEFT and Opacus"] = peers
    return {label: pair for label, pair in found.items() if any(pair)}


def steps_table(results):
    rows = [["", "plain, s", "peak, GB", "private, s", "peak, GB", "private / plain"]]
    for label, pair in steps(results).items():
        cells = [label]
        for r in pair:
            if r is None:
                cells += ["", ""]
            elif "failed" in r:
                cells += failure(r, 2)
            else:
                cells += [f"{r['step_s']:.3f}", f"{r['peak_gb']:.2f}"]
        both = [r["step_s"] for r in pair if r and "failed" not in r]
        rows.append([*cells, f"{both[1] / both[0]:.2f}" if len(both) == 2 else ""])
    return rows


def draw(results, path):
    """Write a PNG with bars of tokens/s and of seconds a step."""
    from matplotlib.figure import Figure

    decoded, trained = decoding(results), steps(results)
    height = 1.5 + 0.45 * max(len(decoded), 2 * len(trained), 2)
    figure = Figure(figsize=(12, height), layout="constrained")
    few, many, training = figure.subplots(1, 3)
    for axes, n in ((few, FEW), (many, MANY)):
        bars = [
            (label, _figure(r, n, "tokens_per_s"), _color(label)) for label, r in decoded.items()
        ]
        _bars(axes, bars, "%.0f", f"tokens/s, {n} prompt{'s' * (n != FEW)}, bfloat16")
    bars = []
    for label, pair in trained.items():
        for r, kind in zip(pair, ("", ", private"), strict=True):
            if r is not None:
                bars.append((label + kind, r.get("step_s"), _color(label, kind)))
    _bars(training, bars, "%.3f", "seconds of a LoRA step")
    unfinished = path.with_name(path.name + ".unfinished")
    figure.savefig(unfinished, format="png", dpi=100)
    unfinished.rename(path)


def _figure(result, *keys):
    for key in keys:
        result = result.get(key) if result else None
    return result


def _color(label, kind=""):
    return COLORS[("ours" if label.startswith("keras") else "peer") + kind]


def _bars(axes, bars, form, title):
    """Draw a bar for each `(label, value or None, color)`. None is a failure."""
    for i, (_, value, color) in enumerate(bars):
        bar = axes.barh(i, value or 0, color=color)
        labels = None if value is not None else ["failed"]
        axes.bar_label(bar, labels=labels, fmt=form, padding=3, fontsize=8)
    axes.set_yticks(range(len(bars)), [label for label, *_ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel(title)
    axes.tick_params(left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
