"""Packages of npm that tools and tests run in Node."""

import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def find_package(name, variable):
    """Return the folder of an installed package, or None.

    Args:
        name: string. Name at npm. It is looked up in the root of the repository.
        variable: string. Environment variable that may name another folder.
    """
    folder = Path(os.environ.get(variable) or ROOT / "node_modules" / name)
    return folder.resolve() if (folder / "package.json").is_file() else None


def ask_node(script, question, **environment):
    """Return what a script of this folder answers to a question, both as JSON."""
    done = subprocess.run(
        ["node", ROOT / "tools" / script],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)
