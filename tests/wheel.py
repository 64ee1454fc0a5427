"""Does the wheel run where there is no compiler? `python tests/wheel.py WHEEL MODEL [--python PYTHON]`

Makes an empty virtual environment, installs the wheel with what it depends on, and asks the demo's question with
nothing but that environment in PATH, from a folder without the sources. Looks for what a wheel has to carry, too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUESTION, ANSWER = "What is the access code of the boathouse?", "7294"
CARRIED = ("runtime/py.typed", "cocktail/py.typed", "kernels_c/_kernels.", "kernels_cu/decode_attention.cu",
           "kernels_cu/common.cuh", "licenses/LICENSE")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--python", default=sys.executable, help="the interpreter to install it for")
    options = parser.parse_args()
    names = zipfile.ZipFile(options.wheel).namelist()
    if missing := [part for part in CARRIED if not any(part in name for name in names)]:
        print(f"error: {options.wheel} lacks {', '.join(missing)}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        venv = Path(folder) / "venv"
        run([options.python, "-m", "venv", str(venv)])
        run([str(venv / "bin/python"), "-m", "pip", "install", "--quiet", "--only-binary", ":all:",
             str(options.wheel.resolve())])
        bare = {"PATH": str(venv / "bin"), "HOME": folder}  # no compiler
        doctor = run(["python", "-m", "cocktail.doctor", "--json"], cwd=folder, env=bare)
        answer = run(["cocktail", str(options.model.resolve()), "--context", str(ROOT / "examples/handbook.txt"),
                      "--query", QUESTION, "--max-tokens", "64", "--backend", "cpu", "--stats", "none"],
                     cwd=folder, env=bare)
    if ANSWER not in answer or '"ok": true' not in doctor:
        print(f"error: the answer is {answer!r}, the doctor says {doctor}", file=sys.stderr)
        return 1
    print(f"{options.wheel.name}: {answer.strip()}")
    return 0


def run(command: list[str], **settings: object) -> str:
    path = settings.get("env", {}).get("PATH")  # type: ignore[attr-defined]
    if path:
        command = [str(Path(path) / command[0]), *command[1:]]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **settings).stdout


if __name__ == "__main__":
    sys.exit(main())
