"""Ctrl-C inside of `attach`, `offload_table` and forwards, at every step there is: the model is what it was."""

import inspect
import itertools
import sys
import warnings
from contextlib import contextmanager, suppress
from unittest import mock

import pytest
import torch
from torch import nn

from engram_ref.attach import attach, graphs, lookup, offload_table, own_table, staging, without_table
from engram_ref.attach import attached as attached_module
from engram_ref.attach import hooks as hooks_module
from engram_ref.attach import offload as offload_module
from engram_ref.attach import step as step_module
from engram_ref.attach.own_table import plan_of
from engram_ref.hashing.device import DeviceHasher
from tests.ref.attach.models import Plainest, make_ids, make_layers
from tests.ref.fusion.qwen_oracle import qwen4, text_config

pytestmark = pytest.mark.slow

OURS = {module.__file__ for module in (attached_module, hooks_module, offload_module, own_table)}
IN_FORWARDS = OURS | {module.__file__ for module in (graphs, lookup, staging, step_module)}
TORCHS = [nn.Module.register_forward_pre_hook, nn.Module.register_forward_hook, nn.Module.__setattr__]
REGISTERS = [name for name in vars(nn.Module()) if name.startswith(("_forward_hooks", "_forward_pre_hooks"))]
TABLE = "model.layers.{}.ple.ple_embedding.ngram_embedding"


@contextmanager
def interrupted_at(step, outermost):
    """Ctrl-C at a step: where a line of ours begins or a function returns, or of those of torch that change a module.

    None where the outermost function returns: nothing can be done any more for who is interrupted there. Nor where a
    generator is let go: Python does not raise what comes then.
    """
    passed, before = 0, sys.gettrace()
    changing = {function.__code__ for function in TORCHS}

    def trace(frame, event, argument):
        nonlocal passed
        if frame.f_code.co_filename not in OURS and frame.f_code not in changing:
            return None
        silent = frame.f_code is outermost.__code__ or frame.f_code.co_flags & inspect.CO_GENERATOR
        if event == "line" or (event == "return" and not silent):
            if passed == step:
                sys.settrace(before)
                raise KeyboardInterrupt
            passed += 1
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def interrupted_in_forward(at):
    """Ctrl-C where a line begins of those files of ours that a forward runs; in a generator until it has yielded.

    A function that returns is not interrupted: Python looks for signals where functions begin, and in loops.
    """
    passed, before, yielded = 0, sys.gettrace(), set()

    def trace(frame, event, argument):
        nonlocal passed
        del argument  # whoever keeps the exception keeps this frame
        if event == "return" and frame.f_code.co_flags & inspect.CO_GENERATOR:
            yielded.add(frame.f_code)
        if frame.f_code.co_filename not in IN_FORWARDS or frame.f_code in yielded:
            return None
        if event == "line":
            if passed == at:
                sys.settrace(before)
                raise KeyboardInterrupt
            passed += 1
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def interrupted_everywhere(call, *given):
    """Interrupt a call at one step after the other, until it gets to its end.

    Yields:
        The step, and what was returned; None where the call was interrupted.
    """
    made = None
    for step in itertools.count():
        with suppress(KeyboardInterrupt), interrupted_at(step, call):
            made = call(*given)
        yield step, made
        if made is not None:
            return


def registers_of(model):
    """All that torch has noted of hooks, in any module."""
    return [len(register) for module in model.modules() for register in map(vars(module).get, REGISTERS)]


# --- attach ---------------------------------------------------------------------------------------


@pytest.fixture
def plainest():
    torch.manual_seed(0)
    return Plainest(3).double().eval()


@torch.no_grad()
def test_an_attach_that_is_interrupted_leaves_no_trace(plainest, monkeypatch):
    monkeypatch.setattr(attached_module, "forget_compiled", lambda: None)  # slow, and needed once only
    model, layers, ids = plainest, make_layers(), make_ids()
    want, none = model(ids), registers_of(model)
    with attach(model, layers.engrams, layers.plan):
        attached = model(ids)
    for step, made in interrupted_everywhere(attach, model, layers.engrams, layers.plan):
        if made is not None:
            assert torch.equal(model(ids), attached) and not torch.equal(attached, want)
            made.detach()
        assert registers_of(model) == none, step
        assert torch.equal(model(ids), want), step
    assert step > 100


def test_a_detach_that_is_interrupted_can_be_done_again(plainest):
    layers, none, ended = make_layers(), registers_of(plainest), None
    for step in itertools.count():
        attached = attach(plainest, layers.engrams, layers.plan)
        with suppress(KeyboardInterrupt), interrupted_at(step, attached_module.Attached.detach):
            ended = attached.detach() is None
        attached.detach()
        assert registers_of(plainest) == none, step
        with pytest.raises(RuntimeError, match="this prefetcher is closed"):
            attached.prefetcher.start(make_ids().numpy())
        if ended:
            break
    assert step > 40


@torch.no_grad()
def test_an_attach_whose_warning_is_an_error_leaves_no_trace(plainest):
    model, layers, ids = plainest, make_layers(), make_ids()
    model.embed_tokens = nn.Embedding(200, 4)  # more token ids than the plan knows
    want, none = model(ids), registers_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"^the model has token ids 0 \.\. 199"):
            attach(model, layers.engrams, layers.plan)
    assert registers_of(model) == none and torch.equal(model(ids), want)
    with pytest.warns(UserWarning, match="the model has token ids") as told, attach(model, layers.engrams, layers.plan):
        assert not torch.equal(model(ids), want)
    assert told[0].filename == __file__


@torch.no_grad()
@pytest.mark.parametrize("hasher", [None, DeviceHasher], ids=["cpu", "device"])
@pytest.mark.parametrize("staged", [False, True], ids=["forward", "staged"])
def test_a_forward_that_is_interrupted_spoils_none_that_follows(plainest, staged, hasher):
    """Though a console keeps the exceptions, and with them what functions had that were ended by them."""
    layers, ids = make_layers(), make_ids()
    plan = layers.plan if hasher is None else hasher(layers.plan, "cpu")

    def forward(attached):
        if not staged:
            return plainest(ids)
        with attached.staging():
            attached.stage(ids)
            return plainest(ids)

    with attach(plainest, layers.engrams, plan) as attached:
        want, kept, made = forward(attached), [], None
        for at in itertools.count():
            for _ in range(2):  # as many as there are buffers
                try:
                    with interrupted_in_forward(at):
                        made = forward(attached)
                except KeyboardInterrupt as error:
                    kept.append(error)
            assert torch.equal(forward(attached), want), at
            assert not staged or torch.equal(plainest(ids), want), at
            if made is not None:
                break
            kept.clear()
    assert at > 100


def test_an_error_on_the_way_in_closes_the_prefetcher(plainest, monkeypatch):
    made = []

    class Kept(attached_module.Prefetcher):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(self)

    def fail():
        raise MemoryError

    monkeypatch.setattr(attached_module, "Prefetcher", Kept)
    layers = make_layers()
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        calls = iter([fail, lambda: None])  # the model has its hooks by then
        patch.setattr(attached_module, "forget_compiled", lambda: next(calls)())
        attach(plainest, layers.engrams, layers.plan)
    with pytest.raises(RuntimeError, match="this prefetcher is closed"):
        made[0].start(make_ids().numpy())
    assert not any(registers_of(plainest))


# --- offload_table --------------------------------------------------------------------------------


class Nothing(nn.Module):
    def forward(self, hidden, *_, **__):
        return hidden


@pytest.fixture
def two_tables():
    torch.manual_seed(0)
    kinds = ["linear_attention", "linear_attention", "full_attention"]
    model = qwen4.Qwen4ExpForCausalLM(text_config(ple_layer_ids=[1, 2], num_hidden_layers=3, layer_types=kinds)).eval()
    for block in model.model.layers[:2]:
        block.linear_attn = Nothing()  # computed hundreds of times, and not ours
    return model


@torch.no_grad()
@pytest.mark.parametrize("placement", ["device", "host"])
def test_an_offload_that_is_interrupted_loses_nothing(placement, two_tables, monkeypatch):
    model, ids = two_tables, make_ids(1, 7)
    tables = {block: model.get_submodule(TABLE.format(block)) for block in (0, 1)}
    weights = {block: (table.weight, table.weight.clone()) for block, table in tables.items()}
    want, none = model(ids).logits, registers_of(model)
    # What comes before anything is changed would be most of the steps.
    embeddings = {block: model.model.layers[block].ple.ple_embedding for block in (0, 1)}
    monkeypatch.setattr(offload_module, "text_model", mock.Mock(return_value=model.model))
    monkeypatch.setattr(offload_module, "plan_of", mock.Mock(return_value=plan_of(model.model, embeddings)))

    for step, made in interrupted_everywhere(offload_table, model, placement):
        if made is not None:
            assert torch.equal(model(ids).logits, want) and made.prefetched == 2
            made.restore()
        assert registers_of(model) == none, step
        for block, table in tables.items():
            weight, bits = weights[block]
            assert model.get_submodule(TABLE.format(block)) is table and table.weight is weight, step
            assert torch.equal(weight, bits), step
    assert step > 100
    assert torch.equal(model(ids).logits, want)


@torch.no_grad()
def test_a_restore_that_is_interrupted_can_be_done_again(two_tables):
    model, ids = two_tables, make_ids(1, 7)
    bits = {block: model.get_submodule(TABLE.format(block)).weight.clone() for block in (0, 1)}
    none, numbers, ended = registers_of(model), torch.tensor([3]), None
    for step in itertools.count():
        offloaded = offload_table(model, "device")
        with suppress(KeyboardInterrupt), interrupted_at(step, offload_module.OffloadedTable.restore):
            ended = offloaded.restore() is None
        offloaded.restore()
        assert registers_of(model) == none, step
        for block, table in offloaded.tables.items():
            assert torch.equal(model.get_submodule(TABLE.format(block)).weight, bits[block]), step
            with pytest.raises(ValueError, match="this table was closed"):
                table.start(numbers)
        if ended:
            break
    assert step > 40
    assert model(ids).logits.isfinite().all()


@torch.no_grad()
def test_an_error_when_the_bytes_are_gone_brings_them_back(two_tables, monkeypatch):
    """Of both tables, though only the first one's had been let go."""
    model, ids = two_tables, make_ids(1, 7)
    want, free = model(ids).logits, own_table.Seat.free

    def freed_and_then(seat, table):
        free(seat, table)
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(own_table.Seat, "free", freed_and_then)
        offload_table(model, "device")
    assert torch.equal(model(ids).logits, want)
    with offload_table(model, "device") as offloaded:
        assert torch.equal(model(ids).logits, want) and offloaded.prefetched == 2


@torch.no_grad()
def test_a_forward_of_an_offloaded_model_that_is_interrupted_leaves_room_for_those_that_follow(two_tables):
    model, ids, kept, made = two_tables, make_ids(1, 7), [], None
    with offload_table(model, "host") as offloaded:
        want = model(ids).logits
        for at in itertools.count():
            for _ in range(2):  # as many as there are buffers
                try:
                    with interrupted_in_forward(at):
                        made = model(ids)
                except KeyboardInterrupt as error:
                    kept.append(error)
            prefetched, late = offloaded.prefetched, offloaded.late
            assert torch.equal(model(ids).logits, want), at
            assert (offloaded.prefetched, offloaded.late) == (prefetched + 2, late), at
            if made is not None:
                break
            kept.clear()
    assert at > 50


def test_models_have_their_tables_again_wherever_without_table_is_interrupted():
    kind, parent = qwen4.Qwen4ExpTextNGramEmbedding, qwen4.Qwen4ExpPreTrainedModel
    was, entered = (kind.__init__, parent._keys_to_ignore_on_load_unexpected), False
    for at in itertools.count():
        with suppress(KeyboardInterrupt), interrupted_in_forward(at), without_table():
            entered = True
        assert (kind.__init__, parent._keys_to_ignore_on_load_unexpected) == was, at
        if entered:
            break
    assert at > 5


def test_what_is_brought_back_in_inference_mode_can_be_trained(two_tables):
    with torch.inference_mode():
        offload_table(two_tables, "device").restore()
    assert not any(parameter.is_inference() for parameter in two_tables.parameters())
    two_tables(make_ids(1, 7)).logits.sum().backward()
    assert two_tables.get_submodule(TABLE.format(0)).weight.grad is not None
    two_tables.zero_grad()
