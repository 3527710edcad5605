"""Writes plans.json: the hash constants of every preset with the DeepSeek-V4 vocabulary.

Why: the multipliers come from NumPy's random generator, whose stream may change from one version to the next,
and a changed multiplier silently rehashes a whole table. The numbers in the file are the ones to keep: a
difference means that the code or NumPy went wrong, so write the file anew only for a new preset.

    python tests/golden/regenerate.py --check      # exit 1 and a diff where code and file disagree
    python tests/golden/regenerate.py              # write the file
"""

import argparse
import difflib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from engram_ref.config import PRESETS, EngramConfig
from engram_ref.hashing import HashPlan, LayerPlan
from engram_ref.vocab import vocab_for

FILE = Path(__file__).with_name("plans.json")


def pin_layer(layer: LayerPlan) -> dict[str, Any]:
    return {
        "layer_id": layer.layer_id,
        "multipliers": list(layer.multipliers),
        "first_prime": layer.primes[0],
        "last_prime": layer.primes[-1],
        "rows": layer.rows,
    }


def pin_plan(plan: HashPlan) -> dict[str, Any]:
    return {
        "compressed_size": plan.compressed_size,
        "pad_compressed": plan.pad_compressed,
        "layers": [pin_layer(layer) for layer in plan.layers],
        "checksum": json.loads(plan.to_json())["checksum"],
    }


def pins() -> str:
    """The content that the file should have."""
    found = {}
    for name in PRESETS:
        config = EngramConfig.preset(name)
        vocab = vocab_for(config)
        found[name] = pin_plan(HashPlan.build(config, len(vocab), vocab.pad(config.pad_id)))
    return json.dumps(found, indent=1) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Pin the hash constants of every preset.")
    parser.add_argument("--check", action="store_true", help="compare with the file, write nothing")
    if not parser.parse_args(arguments).check:
        FILE.write_text(pins(), encoding="utf-8")
        return 0
    kept = FILE.read_text(encoding="utf-8").splitlines(keepends=True)
    found = pins().splitlines(keepends=True)
    sys.stdout.writelines(difflib.unified_diff(kept, found, FILE.name, "what the code gives"))
    return int(kept != found)


if __name__ == "__main__":
    sys.exit(main())
