"""The model whose table is to be placed: its geometry, its rows, and what is known of the blocks around it.

Model.of(preset="v41-flash")
Model.of(path=Path("/models/DeepSeek-V4.1-Flash"))          a checkpoint's folder, or its config.json alone
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engram_ref.checkpoint import config_json, qwen_config
from engram_ref.config import PRESETS, EngramConfig
from engram_ref.hashing.plan import HashPlan

_ANY_SIZE = 1000  # of a vocabulary: rows follow from the primes, whatever it is


@dataclass(frozen=True)
class Experts:
    """The routed experts of a model.

    Attributes:
        nbytes: of all of them, in all blocks.
        count: in a block.
        active: of these, by one token.
    """

    nbytes: int
    count: int
    active: int

    def touched(self, tokens: int) -> int:
        """Bytes of those that so many tokens choose, expected where each chooses by itself and none is preferred."""
        return round(self.nbytes * (1 - (1 - self.active / self.count) ** tokens))


@dataclass(frozen=True)
class Backbone:
    """What a decode step reads beside the rows.

    Attributes:
        blocks: decoder blocks.
        active_values: weights that a token is multiplied with.
        token_bytes: weights that a step of one token reads, at least.
        live_bytes: all weights, read or not.
        source: where the figures are from.
        experts: those among the weights; None for a dense model, or where their number is not known.
    """

    blocks: int
    active_values: int
    token_bytes: int
    live_bytes: int
    source: str
    experts: Experts | None = None

    def step_bytes(self, tokens: int, copies: int = 1) -> int:
        """Weights that a step of so many tokens reads, at least, once for all of them; all but experts in each copy."""
        if self.experts is None:
            return copies * self.token_bytes
        return copies * (self.token_bytes - self.experts.touched(1)) + self.experts.touched(tokens)


# The paper's models without their tables, 5.7 B of 26.7 B values and 18.5 B of 39.5 B: 6 of 55 experts are among what
# is active, so all of them are 55/49 of what is not.
_PAPER_VALUES, _PAPER_ACTIVE = 21_000_000_000, 3_800_000_000
_PAPER = Backbone(
    30,
    _PAPER_ACTIVE,
    2 * _PAPER_ACTIVE,
    2 * _PAPER_VALUES,
    "the paper: 30 blocks, 3.8 billion of 21 billion values active, bfloat16, 6 of 55 experts a token",
    Experts(2 * (_PAPER_VALUES - _PAPER_ACTIVE) * 55 // 49, 55, 6),
)
# Without its table, and with one shared expert, which is among what is active as 10 of the 512 others are.
_QWEN_VALUES, _QWEN_ACTIVE = 125_000_000_000, 6_000_000_000
# By preset. Of the shipped models by audits of their files; the narrowest format in V4.1-Flash is half a byte.
BACKBONES = {
    "paper-27b": _PAPER,
    "paper-40b": _PAPER,
    "v41-flash": Backbone(
        40,
        16_000_000_000,
        8_000_000_000,
        307_000_000_000,
        "audits of its files: 16 billion values active, fp4 at least, 6 of 384 experts a token",
        Experts(289_000_000_000, 384, 6),
    ),
    "qwen38-flash-next": Backbone(
        48,
        _QWEN_ACTIVE,
        2 * _QWEN_ACTIVE,
        2 * _QWEN_VALUES,
        "as published: 6 of 125 billion values active, bfloat16, 10 of 512 experts a token",
        Experts(2 * (_QWEN_VALUES - _QWEN_ACTIVE) * 512 // 502, 512, 10),
    ),
}


@dataclass(frozen=True)
class Model:
    """A model with n-gram tables.

    Attributes:
        name: as shown.
        config: geometry of its tables.
        rows: of each layer's table.
        backbone: None where nothing is known of the rest.
    """

    name: str
    config: EngramConfig
    rows: tuple[int, ...]
    backbone: Backbone | None

    @classmethod
    def of(cls, preset: str | None = None, path: Path | None = None) -> Model:
        """By the name of a published geometry, or from a checkpoint.

        Raises:
            ValueError: no such preset, or a file that is not what it should be.
            OSError: a file cannot be read.
        """
        if path is None:
            config, name = EngramConfig.preset(preset or ""), preset or ""  # "" is refused there
        else:
            config, name = read_geometry(path), path.name
        # A checkpoint with the geometry of a published model is taken for that model.
        known = {key: EngramConfig.preset(key) for key in BACKBONES}
        same = next((BACKBONES[key] for key, published in known.items() if published == config), None)
        plan = HashPlan.build(config, config.compressed_size or _ANY_SIZE, 0)
        return cls(name, config, tuple(layer.rows for layer in plan.layers), same)

    @property
    def table_bytes(self) -> int:
        """Of all layers together, as stored."""
        return sum(self.rows) * self.config.row_bytes()


def read_geometry(path: Path) -> EngramConfig:
    """The geometry that a `config.json` states; tensors are not looked at, so that the file alone is enough.

    Args:
        path: the file, or the folder that holds it.
    """
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        known = f", or --preset {path}" if str(path) in PRESETS else ", downloaded: no name on a hub is looked up"
        raise ValueError(f"{path} does not exist: give a checkpoint's folder or its config.json{known}")
    if path.is_file() and path.name != config_json.CONFIG_FILE:
        raise ValueError(f"{path}: give a checkpoint's folder or its {config_json.CONFIG_FILE}, not another file")
    if qwen_config.read_model_type(folder) in qwen_config.MODEL_TYPES:
        return qwen_config.read_qwen_config(folder)
    return config_json.read_config(folder)
