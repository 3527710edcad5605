"""The demo's layer with a history under torch.compile: the numbers of eager mode, and a history that moved as far.

A compiler may put the write to a history before the reads of it, if it misses that they are the same memory; torch 2.11
did. What is written is therefore made of what was there, which no order of operations can overlook.
"""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from engram_ref.config import EngramConfig
from engram_ref.fusion import DemoFusion, ShortConvHistory

CONFIG = EngramConfig.preset("tiny").replace(form="demo", kernel_size=4, hidden=16, hc_mult=2)
BATCH = 2
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def no_gradients():
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def fusion():
    made = DemoFusion(CONFIG)
    made.reset_parameters(torch.Generator().manual_seed(1))
    assert made.reach == 9
    return made


def inputs(length):
    generator = torch.Generator().manual_seed(length)
    e = torch.randn(BATCH, length, CONFIG.embedding_width, generator=generator)
    return e, torch.randn(BATCH, length, CONFIG.hc_mult, CONFIG.hidden, generator=generator)


def history_of(fusion):
    made = ShortConvHistory(fusion, BATCH)
    made.values.normal_(generator=torch.Generator().manual_seed(2))
    return made


@pytest.mark.slow
def test_compiled_steps_are_those_of_eager_mode(fusion):
    """More of them than the convolution reaches back, where torch 2.11 failed; tests/cuda has other lengths."""
    e, hidden = inputs(12)
    eager, ours = history_of(fusion), history_of(fusion)
    compiled = torch.compile(fusion, dynamic=False)
    for _ in range(2):
        want, got = fusion(e, hidden, eager), compiled(e, hidden, ours)
        # Sums of a few dozen products of size 1 in another order.
        torch.testing.assert_close(got, want, rtol=0, atol=100 * EPS)
        torch.testing.assert_close(ours.values, eager.values, rtol=0, atol=100 * EPS)
    assert not torch.allclose(want, fusion(e, hidden, history_of(fusion)), atol=1e-3)  # the history matters


@pytest.mark.parametrize("length", [8, 9, 40])
def test_what_is_written_over_the_past_is_made_of_the_past(length, fusion):
    written = []

    def look(graph, _):
        for node in graph.graph.nodes:
            if node.target == torch.ops.aten.copy_.default and node.args[0].op == "placeholder":
                written.append(node.args[0] in ancestors(node.args[1]))
        return graph.forward

    backend = aot_autograd(fw_compiler=look, inference_compiler=look, keep_inference_input_mutations=True)
    torch.compile(fusion, backend=backend, dynamic=False, fullgraph=True)(*inputs(length), history_of(fusion))
    assert written == [True]


def ancestors(node):
    """All nodes of a graph that a node is made of."""
    found, todo = set(), [node]
    while todo:
        at = todo.pop()
        if at not in found:
            found.add(at)
            overwritten = at.target == torch.ops.aten.copy.default  # of its first argument nothing is read
            todo += [at.args[1]] if overwritten else at.all_input_nodes
    return found
