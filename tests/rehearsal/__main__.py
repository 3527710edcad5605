"""Run a command on the stand-in, as `python` would run it: a script, or a module after -m.

python -m tests.rehearsal bench/gpu_wall.py --device cuda ...
python -m tests.rehearsal -m pytest tests/cuda/test_tables_cuda.py
"""

import importlib
import runpy
import sys

from tests.rehearsal import install, toy


def run(arguments: list[str]) -> None:
    """Run what `python` would run with these arguments."""
    if arguments[:1] == ["-m"]:
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        from engram_ref import cli

        sys.argv = arguments
        module = importlib.import_module(arguments[0].removesuffix(".py").replace("/", "."))  # the one that toy shrank
        cli.run(module.main, module.PROG)


if __name__ == "__main__":
    install.install()
    toy.shrink()
    run(sys.argv[1:])
