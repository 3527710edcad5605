"""A model of transformers on two ranks that share its tables: the logits of one process, to the bit in float64."""

import sys
import warnings

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from engram_ref.attach import attach
from engram_ref.checkpoint.folder import ModelFolder
from engram_ref.layer import Engram
from engram_ref.prefetch import FetchError
from engram_ref.sharding.plan import ShardPlan
from engram_ref.tables import make_table
from engram_ref.tables.device import DeviceTable
from engram_ref.tables.sharded import serve_others
from examples import sharded_generate
from tests.ref.attach.models import make_ids, make_layers, make_model
from tests.ref.ranks import run_ranks

pytestmark = pytest.mark.slow

NEW_TOKENS = (5, 9)  # of each rank: one is done before the other


def sharded(layers, ranks, **options):
    """The same layers over tables of which this rank owns a part."""
    return {
        layer_id: Engram(
            engram.fusion,
            make_table(
                "sharded",
                layers.weights[layer_id].detach(),
                plan=ShardPlan.of_layer(layers.plan.layer(layer_id), ranks),
                **options,
            ),
        )
        for layer_id, engram in layers.engrams.items()
    }


def prompts(rank):
    return make_ids(batch=1 + rank, length=9 - 2 * rank, seed=rank)


def answers(model, rank):
    """Logits of a prompt, and what is generated from it."""
    logits = model(prompts(rank)).logits
    tokens = model.generate(prompts(rank), max_new_tokens=NEW_TOKENS[rank], do_sample=False)
    return logits.detach(), tokens


@torch.no_grad()
def on_a_rank(rank, form, ranks, same_tokens):
    model, layers = make_model(), make_layers(form=form)
    engrams = sharded(layers, ranks, same_tokens=same_tokens)
    mine = 0 if same_tokens else rank
    with attach(model, engrams, layers.plan):
        logits, tokens = answers(model, mine)
        tables = [engram.table for engram in engrams.values()]
        if not same_tokens:
            serve_others(tables)
    moved = [table.report().rows for table in tables]
    for table in tables:
        table.close()
    return logits.numpy(), tokens.tolist(), moved


@pytest.mark.parametrize("same_tokens", [False, True], ids=["own tokens", "same tokens"])
@pytest.mark.parametrize("form", ["demo", "v41"])
def test_logits_and_tokens_are_those_of_one_process(form, same_tokens):
    found = run_ranks(2, on_a_rank, form, 2, same_tokens)
    model, layers = make_model(), make_layers(form=form)
    plain = model(prompts(0)).logits
    with torch.no_grad(), attach(model, layers.engrams, layers.plan):
        for rank, (logits, tokens, moved) in enumerate(found):
            expected, expected_tokens = answers(model, 0 if same_tokens else rank)
            assert np.array_equal(logits.view(np.int64), expected.numpy().view(np.int64))
            assert tokens == expected_tokens.tolist() and all(moved)
        assert not torch.equal(plain, answers(model, 0)[0])  # the layers do something


@torch.no_grad()
def unknown_token(rank):
    model, layers = make_model(), make_layers()
    engrams = sharded(layers, 2)
    ids = prompts(rank)
    vocab = np.arange(90)  # the model knows 97 tokens
    found = []
    with pytest.warns(UserWarning), attach(model, engrams, layers.plan, vocab):
        wrong = ids.clamp(max=80)
        if rank == 1:
            wrong[0, -1] = 95
        with pytest.raises((ValueError, FetchError)) as caught:
            model(wrong)
        found.append(str(caught.value).rpartition("failed: ")[2])  # what failed on one rank, the other calls a fetch
        logits = model(ids.clamp(max=80)).logits
    return found, logits.numpy()


def test_a_token_that_one_rank_does_not_know_is_refused_by_both():
    (first, _), (second, _) = run_ranks(2, unknown_token)
    assert first == second and "(on rank 1 of 2)" in first[0] and "95" in first[0]


# --- training --------------------------------------------------------------------------------------------------


def train(rank, inside):
    """Weights, fusion and rows, after two steps, each with one sequence of two; and what was warned of."""
    model, layers = make_model().train(), make_layers((1,))
    rows = torch.nn.Parameter(layers.weights[1].detach())
    engrams = {1: Engram(layers.engrams[1].fusion, DeviceTable(rows))}
    if inside:
        model.engrams, model.rows = torch.nn.ModuleDict({"1": engrams[1]}), rows
    weights = [*engrams[1].parameters(), rows]
    optimizer = torch.optim.SGD({*model.parameters(), *weights}, lr=0.1)
    wrapped = model if rank is None else DistributedDataParallel(model)
    with warnings.catch_warnings(record=True) as told, attach(model, engrams, layers.plan):
        warnings.simplefilter("always")
        with torch.no_grad():
            model(prompts(0))  # is not trained, so nothing is told
        assert not told
        for seed in (1, 2):
            ids = make_ids(2, seed=seed)
            mine = ids if rank is None else ids[rank : rank + 1]
            optimizer.zero_grad()
            wrapped(input_ids=mine, labels=mine, use_cache=False).loss.backward()
            optimizer.step()
    messages = [str(one.message) for one in told if "Engram" in str(one.message)]
    return torch.cat([weight.detach().double().flatten() for weight in weights]).numpy(), messages


def test_layers_in_the_model_are_trained_on_two_ranks_as_on_one():
    alone, told = train(None, inside=False)
    assert told == []
    for weights, told in run_ranks(2, train, True):
        np.testing.assert_allclose(weights, alone, rtol=0, atol=1e-7)  # rows are float32
        assert told == []


def test_layers_outside_of_the_model_drift_apart_and_it_is_told_once():
    (first, told), (second, _) = run_ranks(2, train, False)
    assert abs(first - second).max() > 1e-4
    assert len(told) == 1 and told[0].startswith(
        "training on 2 ranks with Engram weights that are not in the model that attach"
    )


# --- the example ---------------------------------------------------------------------------------------------


def example(rank, folder):
    return sharded_generate.report(ModelFolder.open(folder), 3)


def test_the_example_generates_on_two_ranks(tmp_path, vocab_v4):
    sharded_generate.write_checkpoint(tmp_path / "model")
    first, second = run_ranks(2, example, tmp_path / "model")
    assert first.startswith("rank 0 of 2: 9 + 3 tokens, holds 7,1") and second.startswith("rank 1 of 2: 10 + 7 tokens")
    assert "as the plan says" in first and "to the bit" in second


def test_the_example_says_how_it_is_run(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["sharded_generate.py"])
    with pytest.raises(SystemExit) as ended:
        sharded_generate.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and "torchrun --standalone --nproc-per-node 2" in error
