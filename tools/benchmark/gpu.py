"""Compare a GPU with the CPU and with transformers, PEFT and Opacus, in a few minutes.

    tools/benchmark/gpu.sh FOLDER [--backends jax torch] [--only decode private] [--seconds 480]

Correctness against the CPU, greedy decoding in bfloat16, plain and private LoRA steps, and the peak
of the device's memory, at VaultGemma 1B's size with random weights. Backends that see no GPU are
left out, with a sentence that says what is missing; with --tiny they run on the CPU, to try the
script.

Each section runs in a process of its own with a time limit. FOLDER gets its result as
SECTION_LIBRARY.json and its messages as SECTION_LIBRARY.log, and after each section report.md and
report.png. A section that fails has its reason there. A second run with the same folder measures
what failed or is missing. Exits with 1 if there is such a section.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gpu_report

BACKENDS = ("torch", "jax", "tensorflow")
SCRIPT = Path(__file__).with_name("gpu_sections.py")
PARTS = {
    "correctness": ("correctness",),
    "decode": ("bandwidth", "decode", "decode_transformers"),
    "lora": ("plain", "peft"),
    "private": ("private", "opacus"),
}
"""Sections by what `--only` names, in their order."""
PEERS = {"decode_transformers", "peft", "opacus"}
"""Sections of PyTorch alone, which do not use this package's models."""
LIMITS = {"probe": 60, "correctness": 120, "bandwidth": 40}
SECONDS, DEFAULT_LIMIT = 480, 90
"""Seconds of all sections together, and of one. With --seconds the limits grow in proportion."""


def run(section, backend, tiny, seconds, log):
    """Run a section in a process of its own.

    Args:
        section: key of `gpu_sections.SECTIONS`.
        backend: string.
        tiny: bool.
        seconds: float. Time limit.
        log: path of the file for what the section prints.

    Returns:
        Its figures, or `{"failed": reason}`.
    """
    if seconds < 5:
        return {"failed": "no time was left"}
    with tempfile.TemporaryDirectory() as home, open(log, "w") as messages:
        environment = {
            **os.environ,
            "KERAS_BACKEND": backend,
            "KERAS_VAULTGEMMA_HOME": home,
            "PYTHONWARNINGS": "ignore",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        command = [sys.executable, str(SCRIPT), section, *["--tiny"] * tiny]
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=messages,
            text=True,
            start_new_session=True,
        )
        try:
            printed, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"failed": f"took more than {seconds:.0f} s"}
        finally:
            stop(process)
    if process.returncode:
        return {"failed": reason(process.returncode, Path(log).read_text(errors="replace"))}
    lines = printed.splitlines()
    return json.loads(lines[-1]) if lines else {"failed": "printed nothing"}


def stop(process):
    """End a process and those that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def reason(status, messages):
    """Return why a process failed: the last line of its traceback, or the signal."""
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    errors = re.findall(r"^[\w.]+(?:Error|Exception|Interrupt|Exit)\b.*", messages, re.MULTILINE)
    return errors[-1].strip()[:200] if errors else f"exit status {status}"


def commit():
    """Return the commit of this file's repository, or None without Git."""
    command = ["git", "-C", str(SCRIPT.parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(path, value):
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(value, indent=1) + "\n")
    unfinished.rename(path)


def read_json(path):
    return json.loads(path.read_text()) if path.exists() else None


def plan(parts, backends, devices, tiny):
    """Return the pairs of section and backend that are measured, in order."""
    usable = [b for b in backends if devices[b]["device"] or (tiny and devices[b]["versions"])]
    pairs = []
    for part in parts:
        for section in PARTS[part]:
            pairs += [(section, b) for b in usable if section not in PEERS or b == "torch"]
    return pairs


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the results are written")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit; default: 480")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, also on a CPU")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    # Raises SystemExit here, so that no process is left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Ended by SIGTERM"))
    folder, tiny = options.folder, options.tiny
    folder.mkdir(parents=True, exist_ok=True)

    def measure(section, backend):
        limit = LIMITS.get(section, DEFAULT_LIMIT) * options.seconds / SECONDS
        seconds = min(limit, deadline - time.monotonic())
        log = folder / f"{section}_{backend}.log"
        return run(section, backend, tiny, seconds, log)

    with ThreadPoolExecutor() as threads:
        found = threads.map(lambda backend: measure("probe", backend), options.backends)
        devices = dict(zip(options.backends, found, strict=True))
    for backend, probed in devices.items():
        if "failed" in probed:
            missing = f"{backend} cannot be used: {probed['failed']}."
            devices[backend] = {"device": None, "versions": {}, "missing": missing}
        print(devices[backend]["missing"] or f"{backend}: {devices[backend]['device']}", flush=True)
    about = {
        "devices": devices,
        "tiny": tiny,
        "commit": commit(),
        "date": time.strftime("%d %B %Y"),
    }
    results = {}
    for section, backend in plan(options.only, options.backends, devices, tiny):
        path = folder / f"{section}_{backend}.json"
        known = read_json(path)
        if known and known["tiny"] == tiny and "failed" not in known["result"]:
            results[section, backend] = known["result"]
            continue
        start = time.monotonic()
        result = results[section, backend] = measure(section, backend)
        spent = round(time.monotonic() - start, 1)
        write_json(path, {"tiny": tiny, "seconds": spent, "result": result})
        print(f"{section}, {backend}, {spent} s: {result.get('failed', 'done')}", flush=True)
        gpu_report.write(folder, about, results)
    if not results:
        return "Nothing was measured, because no backend sees a GPU. --tiny tries it on a CPU."
    gpu_report.write(folder, about, results)
    print(f"\n{(folder / 'report.md').read_text(encoding='utf-8')}")
    failed = [" ".join(key) for key, result in results.items() if "failed" in result]
    return f"Failed: {', '.join(failed)}" if failed else None


if __name__ == "__main__":
    sys.exit(main())
