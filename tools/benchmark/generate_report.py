"""The results of generate.py: stored in a file, printed as tables, plotted."""

import json

DTYPES = ("float32", "bfloat16", "int8")
NAMES = {"generate": "keras_vaultgemma", "keras_hub": "keras-hub", "transformers": "transformers"}


def read(path):
    """Read `{(step, backend, dtype): figures}` from a file of `write`. Return {} without one."""
    if path is None or not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {tuple(row.pop(name) for name in ("step", "backend", "dtype")): row for row in rows}


def write(results, path):
    rows = (
        dict(zip(("step", "backend", "dtype"), key, strict=True)) | r for key, r in results.items()
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def print_tables(results):
    columns = [
        "",
        "first call, s (warm compilation cache)",
        "x keras-hub",
        "first token, s",
        "x keras-hub",
    ]
    columns += ["tokens/s", "x keras-hub", "share of the memory limit"]
    rows = []
    for (step, backend, dtype), r in in_order(results):
        cached, hub = (
            results.get(("warm_cache", backend, dtype)),
            results.get(("keras_hub", backend, dtype)),
        )
        first_call = f"{r['first_call_s']:.2f}"
        ratios = ["", "", ""]
        if step == "generate" and cached:
            first_call += f" ({cached['first_call_s']:.2f})"
        if hub and step == "generate":
            ratios = [f"{r['first_call_s'] / hub['first_call_s']:.2f}"]
            if cached:
                ratios[0] += f" ({cached['first_call_s'] / hub['first_call_s']:.2f})"
            ratios += [f"1/{hub['first_token_s'] / r['first_token_s']:.0f}"]
            ratios += [f"{r['tokens_per_s'] / hub['tokens_per_s']:.2f}"]
        limit = r.get("limit_tokens_per_s")
        share = f"{r['tokens_per_s'] / limit:.2f}" if limit else ""
        figures = (
            first_call,
            ratios[0],
            f"{r['first_token_s']:.2f}",
            ratios[1],
            f"{r['tokens_per_s']:.2f}",
            ratios[2],
        )
        rows.append([f"{NAMES[step]}, {backend}, {dtype}", *figures, share])
    print_table(columns, rows)
    rows = []
    for key in dict.fromkeys(
        key[1:] for key in results if key[0] in ("batch", "prompt_lookup", "memory")
    ):
        batch, lookup, memory = (
            results.get((step, *key)) for step in ("batch", "prompt_lookup", "memory")
        )
        row = [", ".join(key)]
        if batch:
            row += [
                f"{batch['tokens_per_s']:.1f} ({batch['prompts']})",
                f"{batch['x_1_prompt']:.2f}",
            ]
        else:
            row += ["", ""]
        row += [f"{lookup['x_without']:.2f}" if lookup else ""]
        row += [f"{memory['variables_over_float32']:.2f}" if memory else ""]
        memory = memory or {}
        names = ("gb_above_weights", "gb_of_cache")
        row += [" / ".join(f"{memory[name]:.2f}" for name in names) if names[0] in memory else ""]
        rows.append(row)
    columns = ["", "tokens/s of a batch (prompts)", "x 1 prompt", "prompt lookup, x without"]
    print_table([*columns, "weights, x float32", "memory above weights / of the cache, GB"], rows)
    for (step, backend, _), loss in results.items():
        if step == "int8_loss":
            before, after = loss["float32"], loss["int8"]
            print(
                f"\nBits per byte of the bundled model on held-out text, {backend}: "
                f"{before:.4f}, int8 {after:.4f}"
            )


def print_table(columns, rows):
    if rows:
        print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for row in rows:
            print(f"| {' | '.join(row)} |")


def in_order(results):
    """Return the results of text generation by dtype, the fastest first."""
    found = [item for item in results.items() if item[0][0] in NAMES]
    return sorted(found, key=lambda item: (DTYPES.index(item[0][2]), -item[1]["tokens_per_s"]))


def draw(results, path):
    """Write a PNG with a bar of tokens/s per model and dtype, and a mark at the memory's limit."""
    from matplotlib.figure import Figure

    colors = dict(zip(NAMES, ("#2a6fbb", "#a9a9a9", "#d9a441"), strict=True))
    count = len(in_order(results))
    figure = Figure(figsize=(8, 1.5 + count / 3), layout="constrained")
    axes, ticks, place = figure.add_subplot(), {}, 0
    for dtype in DTYPES:
        group = [item for item in in_order(results) if item[0][2] == dtype]
        for (step, backend, _), r in group:
            bar = axes.barh(place, r["tokens_per_s"], height=0.75, color=colors[step])
            axes.bar_label(bar, fmt="%.1f", padding=-26, fontsize=8, color="white")
            if limit := r.get("limit_tokens_per_s"):
                axes.plot([limit, limit], [place - 0.4, place + 0.4], color="black", linewidth=1.5)
            ticks[place] = f"{NAMES[step]}, {backend}, {dtype}"
            place += 1
        place += 1.5 * bool(group)
    axes.set_yticks(list(ticks), ticks.values(), fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("tokens/s, decoding one prompt (black: what memory allowed meanwhile)")
    axes.tick_params(left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    unfinished = path.with_name(path.name + ".unfinished")
    figure.savefig(unfinished, format="png", dpi=100)
    unfinished.rename(path)
