"""Run the tests marked ``compat`` with another release of transformers, every other package as it is in .venv.

A dependency of transformers is swapped as well where the one in .venv does not suit that release.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
RELEASES = {
    "floor": "the lowest release that pyproject.toml admits",
    "ceiling": "the newest release that pyproject.toml admits",
    "newest": "the newest release on the package index",
}
SHOW_VERSIONS = """
import sys
from importlib.metadata import version
print(", ".join(f"{name} {version(name)}" for name in sys.argv[1:]))
"""


def pip(*arguments: str) -> str:
    """Standard output of pip; ends the program where pip fails."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"compat: {' '.join(command)} failed")
    return done.stdout


def declared() -> Requirement:
    """The range of transformers in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return next(r for r in map(Requirement, project["dependencies"]) if r.name == "transformers")


def changes(release: str) -> dict[str, str]:
    """Packages and versions that pip would change in .venv to get this release of transformers."""
    (floor,) = (part.version for part in declared().specifier if part.operator == ">=")
    wanted = {"floor": f"transformers=={floor}", "ceiling": str(declared()), "newest": "transformers"}[release]
    # Without an index, `--upgrade` is content with the installed release; `--ignore-installed` fails.
    asked = pip("install", "--dry-run", "--ignore-installed", "--no-deps", "--report", "-", wanted)
    (newest,) = json.loads(asked)["install"]
    wanted = f"transformers=={newest['metadata']['version']}"
    report = json.loads(pip("install", "--dry-run", "--upgrade", "--report", "-", wanted))
    return {item["metadata"]["name"]: item["metadata"]["version"] for item in report["install"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", choices=RELEASES, help="; ".join(f"{k}: {v}" for k, v in RELEASES.items()))
    parser.add_argument(
        "--unless-covered",
        action="store_true",
        help="run nothing where the release is the one in .venv, or where `newest` is the same as `ceiling`",
    )
    options = parser.parse_args()

    swapped = changes(options.release)
    found = swapped.get("transformers", version("transformers"))
    inside = declared().specifier.contains(found, prereleases=True)
    is_covered = "transformers" not in swapped or (options.release == "newest" and inside)
    if options.unless_covered and is_covered:
        print(f"compat: transformers {found} is {RELEASES[options.release]}; it is tested already", flush=True)
        return 0

    environment = dict(os.environ)
    if swapped:
        target = ROOT / ".venv" / "compat"
        shutil.rmtree(target, ignore_errors=True)
        pip("install", "--no-deps", "--target", str(target), *(f"{name}=={v}" for name, v in swapped.items()))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(target), os.environ.get("PYTHONPATH")]))

    # Asked in the environment of the tests: the releases that they import.
    names = dict.fromkeys(("transformers", "torch", "tokenizers", "huggingface_hub", *swapped))
    ask = [sys.executable, "-c", SHOW_VERSIONS, *names]
    shown = subprocess.run(ask, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    place = "in" if inside else "OUTSIDE"
    about = f"{shown}, Python {sys.version.split()[0]} ({place} the declared range {declared()})"

    print(f"compat: {RELEASES[options.release]}: {about}", flush=True)
    failed = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "compat and not extended", "-n", "auto", "--maxprocesses", "8"],
        env=environment,
        cwd=ROOT,
    ).returncode
    print(f"compat: {'FAILED' if failed else 'passed'} with {about}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
