"""The implementations of the hash, each asked in the same way: NumPy, numba, torch, Triton, plain Python.

way = Way("torch", plan)
rows = way.rows(ids, history)   # of all layers, [B, T, layers, C]
way.advance(history, ids)       # each way carries a history of its own kind
"""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch

import engram_toy.hashing as toy
from engram_ref import gpu
from engram_ref.hashing import HashPlan, NgramHasher, TokenHistory
from engram_ref.hashing.device import DeviceHasher
from engram_ref.hashing.device_ids import DeviceHistory

WAYS = ("numpy", "numba", "torch", "triton", "twin")


class Way:
    """One implementation; `history` may be None at the start of sequences."""

    def __init__(self, name: str, plan: HashPlan) -> None:
        if name == "triton" and not gpu.INTERPRETED:
            pytest.skip("Triton is not interpreted here: tests/cuda compares the kernel on a GPU")
        self.name, self.plan = name, plan
        if name == "twin":
            self.hasher: Any = toy.NgramHasher(json.loads(plan.to_json()))
        elif name in ("numpy", "numba"):
            self.hasher = NgramHasher(plan, name)
        else:
            self.hasher = DeviceHasher(plan, "cpu", fused=name == "triton")

    def history(self, batch: int) -> Any:
        if self.name == "twin":
            return [toy.TokenHistory(self.hasher.plan) for _ in range(batch)]
        if self.name in ("numpy", "numba"):
            return TokenHistory(self.plan, batch)
        return DeviceHistory(self.plan, batch, "cpu")

    def advance(self, history: Any, ids: np.ndarray) -> None:
        if self.name == "twin":
            for sequence, past in zip(ids.tolist(), history):
                past.advance(sequence)
        else:
            history.advance(ids if self.name in ("numpy", "numba") else torch.from_numpy(ids))

    def rows(self, ids: np.ndarray, history: Any = None) -> np.ndarray:
        """[B, T, layers, C] of ids [B, T]; a history is read."""
        if self.name in ("torch", "triton"):
            return torch.stack([*self.hasher(torch.from_numpy(ids), history).values()], dim=2).numpy()
        layers = [layer.layer_id for layer in self.plan.layers]
        if self.name != "twin":
            return np.stack([self.hasher(ids, layer_id, history=history) for layer_id in layers], axis=2)
        pasts = [None] * len(ids) if history is None else history
        sequences = [
            [self.hasher(sequence, layer_id, history=past) for layer_id in layers]
            for sequence, past in zip(ids.tolist(), pasts)
        ]
        return np.array(sequences).swapaxes(1, 2)

    def in_chunks(self, ids: np.ndarray, cuts: Iterable[int]) -> np.ndarray:
        """The rows of one chunk after the other, put together; an empty chunk only passes the history."""
        history, rows = self.history(len(ids)), []
        for chunk in np.split(ids, list(cuts), axis=1):
            if chunk.size:
                rows.append(self.rows(chunk, history))
            self.advance(history, chunk)
        return np.concatenate(rows, axis=1)
