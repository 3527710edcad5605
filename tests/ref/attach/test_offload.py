"""The n-gram table of a transformers model behind our placements: the logits are those of the untouched model, to the
bit, and everything is given back.
"""

import copy
import itertools
import re
import warnings

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from engram_ref.attach import offload_table, without_table
from engram_ref.tables import make_table
from engram_ref.tables.file import StoredRows, save_rows
from tests.ref.fusion.qwen_oracle import qwen4, text_config
from tests.ref.threads.together import in_threads

EOS = 7
BLOCKS = dict(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])  # the first has the table
TWO_TABLES = dict(ple_layer_ids=[1, 3], num_hidden_layers=4, layer_types=None)  # in blocks 0 and 2
WHERE = "layers.0.ple.ple_embedding.ngram_embedding"


def make_model(seed=0, **changes):
    """A small model of the class in which every weight matters; the class begins with gains and taps of 0."""
    torch.manual_seed(seed)
    model = qwen4.Qwen4ExpForCausalLM(text_config(**BLOCKS | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ple" in name:
                parameter.normal_(0, 0.5)
    return model


@pytest.fixture(scope="module")
def model():
    """Shared: every test must leave it as it was."""
    made = make_model()
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in made.named_parameters()}
    yield made
    assert [name for name, _ in made.named_parameters()] == list(before)
    for name, parameter in made.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.modules())


def table_of(model):
    return model.get_submodule(f"model.{WHERE}")


def ids_of(batch, length, seed=1):
    """Token ids with ends of text among them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 1000, (batch, length), generator=generator)
    return ids.masked_fill(torch.rand(batch, length, generator=generator) < 0.2, EOS)


@torch.no_grad()
def logits(model, ids, **given):
    return model(ids, **given).logits


# --- every placement ------------------------------------------------------------------------------


def placements(model, tmp_path):
    """Each placement that a CPU has, as arguments of `offload_table`."""
    save_rows(tmp_path / "table.safetensors", table_of(model).weight.detach())
    stored = StoredRows.find(tmp_path / "table.safetensors")
    return {
        "host": {},
        "device": {},
        "hot": {"hot": torch.arange(0, 16_896, 3)},
        "file": {"rows": stored},
        "hot before a file": {"placement": "hot", "rows": stored, "hot": torch.arange(99), "behind": "file"},
    }


@pytest.mark.parametrize("name", ["host", "device", "hot", "file", "hot before a file"])
@pytest.mark.parametrize("prefetch", [True, False])
def test_every_placement(model, tmp_path, name, prefetch):
    ids = ids_of(2, 40)
    expected = logits(model, ids)
    arguments = {"placement": name, **placements(model, tmp_path)[name]}
    parameter, table = table_of(model).weight, table_of(model)
    bits = parameter.detach().clone()
    with offload_table(model, prefetch=prefetch, **arguments) as offloaded:
        assert torch.equal(logits(model, ids), expected)
        assert (offloaded.prefetched, offloaded.late) == ((1, 0) if prefetch else (0, 1))
        if name == "host":  # the table uses the model's own memory
            assert offloaded.freed_bytes == {} and parameter.shape == bits.shape
        else:
            assert offloaded.freed_bytes == {"cpu": 16_896 * 8 * 4} and parameter.nbytes == 0
    assert table_of(model) is table and table.weight is parameter and torch.equal(parameter, bits)
    assert torch.equal(logits(model, ids), expected)
    offloaded.restore()  # does nothing more


def test_restoring_again_does_nothing_to_the_next_one(model):
    ids = ids_of(1, 9)
    first = offload_table(model, "device")
    first.restore()
    with offload_table(model, "device") as second:
        first.restore()
        logits(model, ids)
        assert (second.prefetched, second.late) == (1, 0)


# --- what a model is used for ---------------------------------------------------------------------


def chunked(model, ids, mask, cuts):
    """Logits of all chunks, through one cache."""
    cache, parts = None, []
    bounds = [0, *cuts, ids.shape[1]]
    for start, stop in itertools.pairwise(bounds):
        given = {} if mask is None else {"attention_mask": mask[:, :stop]}
        with torch.no_grad():
            out = model(ids[:, start:stop], past_key_values=cache, use_cache=True, **given)
        cache = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, dim=1)


MASKS = {"none": None, "left": slice(0, 4), "right": slice(9, 13), "holes": slice(1, 12, 4)}


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("cuts", [[], [1], [5, 6, 7, 11], list(range(1, 13))], ids=["whole", "1", "some", "steps"])
def test_caches_and_padding(model, side, cuts):
    ids, mask = ids_of(2, 13), None
    if MASKS[side] is not None:
        mask = torch.ones(2, 13, dtype=torch.int64)
        mask[1, MASKS[side]] = 0
    expected = chunked(model, ids, mask, cuts)
    with offload_table(model, "device") as offloaded:
        assert torch.equal(chunked(model, ids, mask, cuts), expected)
        assert offloaded.late == 0 and offloaded.prefetched == len(cuts) + 1


WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
    "without a cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_generate(model, way):
    ids = ids_of(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0

    def generate():
        torch.manual_seed(5)
        given = {"attention_mask": mask, "max_new_tokens": 5, "pad_token_id": 0, "output_scores": True}
        return model.generate(ids, return_dict_in_generate=True, eos_token_id=999, **given, **WAYS[way])

    expected = generate()
    with offload_table(model, "device") as offloaded:
        found = generate()
        assert offloaded.prefetched and not offloaded.late
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.scores, expected.scores, strict=True))


def test_two_tables():
    """The second layer's rows come from other primes and multipliers than the first one's."""
    model = make_model(**TWO_TABLES)
    ids = ids_of(2, 21)
    expected = chunked(model, ids, None, [6])
    with offload_table(model, "device") as offloaded:
        assert list(offloaded.tables) == [0, 2]
        assert torch.equal(chunked(model, ids, None, [6]), expected)
        assert offloaded.freed_bytes == {"cpu": (16_896 + 18_688) * 8 * 4}
    with pytest.raises(ValueError, match=r"^rows for blocks \[0, 2\]: give a mapping with those of blocks \[0, 2\]"):
        offload_table(model, "host", table_of(model).weight.detach())
    rows = {block: model.model.layers[block].ple.ple_embedding.ngram_embedding.weight.detach() for block in (0, 2)}
    with offload_table(model, "device", {block: values.clone() for block, values in rows.items()}):
        assert torch.equal(chunked(model, ids, None, [6]), expected)


def test_embeddings_without_token_ids_are_looked_up_late(model):
    ids = ids_of(1, 11)
    embeds = model.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        expected = model(inputs_embeds=embeds).logits
        with offload_table(model, "device") as offloaded:
            assert torch.equal(model(inputs_embeds=embeds).logits, expected)
            assert (offloaded.prefetched, offloaded.late) == (0, 1)


def test_gradients_of_two_forwards(model):
    """The second fetch fills the buffer of the first one before its gradients are computed."""
    weight = model.model.layers[0].ple.key_proj.weight

    def gradient():
        losses = [model(ids_of(1, 13, seed)).logits.square().mean() for seed in (1, 2, 3)]
        (found,) = torch.autograd.grad(sum(losses), [weight])
        return found

    expected = gradient()
    with offload_table(model, "device"):
        assert torch.equal(gradient(), expected)
    assert expected.abs().max() > 0


@pytest.mark.parametrize("prefetch", [True, False])
def test_gradients_by_torch_func(prefetch, model):
    """Of a function of weights and token ids, which torch wraps, both."""
    name, ids = "model.layers.0.ple.key_proj.weight", ids_of(1, 13)

    def loss(weight, ids):
        return torch.func.functional_call(model, {name: weight}, (ids,), dict(use_cache=False)).logits.square().mean()

    weight = model.get_parameter(name).detach()
    expected = torch.func.grad(loss)(weight, ids)
    with offload_table(model, "host", prefetch=prefetch):
        assert torch.equal(torch.func.grad(loss)(weight, ids), expected)
        with pytest.raises(ValueError, match=r"input_ids inside of torch\.func\.vmap"):
            torch.func.vmap(lambda ids: loss(weight, ids))(ids[None])
    assert expected.abs().max() > 0


def test_gradient_checkpointing():
    model, ids = make_model(), ids_of(1, 13)  # a model of its own: transformers leaves a hook in it

    def gradient():
        (found,) = torch.autograd.grad(model(ids).logits.square().mean(), [model.model.layers[0].ple.key_proj.weight])
        return found

    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    expected = gradient()
    with offload_table(model, "device") as offloaded:
        assert torch.equal(gradient(), expected)
        assert offloaded.prefetched == 1 and offloaded.late == 1  # the block, and the block once more


class _Nothing(nn.Module):
    def forward(self, hidden, *_, **__):
        return hidden


@pytest.mark.slow
def test_compiled():
    """What was compiled with the table in its place does not outlive the change, nor what was compiled without.

    Without a code generator, whose rounding differs with where a graph ends, compiled is as it was written.
    """
    model, ids = make_model(num_hidden_layers=1, layer_types=["linear_attention"]), ids_of(2, 12)
    (block,) = model.model.layers
    # What the class computes beside its table is not ours: tracing that takes twice as long as all else.
    block.linear_attn, block.mlp = _Nothing(), _Nothing()
    compiled = torch.compile(model, backend="eager")
    expected = logits(model, ids, use_cache=False)
    assert torch.equal(logits(compiled, ids, use_cache=False), expected)
    with offload_table(model, "device") as offloaded:
        assert torch.equal(logits(compiled, ids, use_cache=False), expected)
        assert (offloaded.prefetched, offloaded.late) == (1, 0)
    assert torch.equal(logits(compiled, ids, use_cache=False), expected)


def test_threads(model):
    batches = [ids_of(1, 30, seed) for seed in range(3)]
    expected = [logits(model, ids) for ids in batches]
    with offload_table(model, "device") as offloaded:
        found = in_threads(lambda n: [logits(model, batches[n]) for _ in range(2)], len(batches))
        assert offloaded.prefetched
    assert all(torch.equal(ours, want) for each, want in zip(found, expected, strict=True) for ours in each)


def test_an_error_in_a_forward_leaves_room_for_the_next(model):
    ids = ids_of(1, 9)
    expected = logits(model, ids)
    with offload_table(model, "device") as offloaded:
        for _ in range(5):  # more than there are buffers
            with pytest.raises(IndexError):
                logits(model, ids + 1000)
        assert torch.equal(logits(model, ids), expected)
        assert offloaded.late == 0


# --- models that never had the table --------------------------------------------------------------


def test_from_pretrained_without_the_table(model, tmp_path):
    model.save_pretrained(tmp_path)
    ids = ids_of(2, 15)
    expected = logits(model, ids)
    with without_table():
        lean = qwen4.Qwen4ExpForCausalLM.from_pretrained(tmp_path).eval()
    assert not any("ngram_embedding.weight" in name for name, _ in lean.named_parameters())
    with pytest.raises(RuntimeError, match="this model was loaded without its n-gram table: offload_table"):
        logits(lean, ids)
    with pytest.raises(ValueError, match="the table's weights are not in this model: give rows="):
        offload_table(lean, "host")
    absent = table_of(lean)
    with offload_table(lean, "host", table_of(model).weight.detach()) as offloaded:
        assert torch.equal(logits(lean, ids), expected) and offloaded.freed_bytes == {}
    assert table_of(lean) is absent
    assert torch.equal(logits(qwen4.Qwen4ExpForCausalLM.from_pretrained(tmp_path).eval(), ids), expected)


def test_built_on_meta(model):
    """As accelerate's init_empty_weights: everything is loaded but the table."""
    ids = ids_of(2, 15)
    with torch.device("meta"):
        lean = qwen4.Qwen4ExpForCausalLM(text_config(**BLOCKS)).eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if "ngram_embedding.weight" not in name}
    lean.load_state_dict(state, strict=False, assign=True)
    lean.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)  # has buffers that no state dict holds
    assert table_of(lean).weight.is_meta
    with offload_table(lean, "device", table_of(model).weight.detach()):
        assert torch.equal(logits(lean, ids), logits(model, ids))
    assert table_of(lean).weight.is_meta


# --- what is refused ------------------------------------------------------------------------------


def test_other_rows_than_the_class_computes_are_refused(model):
    ids = ids_of(1, 9)
    hashed = model.model.layers[0].ple.ple_embedding
    right = hashed.layer_multipliers.clone()
    with offload_table(model, "device"):
        hashed.layer_multipliers[1] += 2
        try:
            with pytest.raises(
                ValueError, match=r"^the model looks up row \d+ where row \d+ were fetched at its entry"
            ):
                logits(model, ids)
        finally:
            hashed.layer_multipliers.copy_(right)
        logits(model, ids)


def test_rows_that_are_not_the_models_are_refused(model):
    own = table_of(model).weight.detach()
    wrong = own.clone()
    wrong[16_000, 3] += 1
    for rows, message in (
        (wrong, "rows for block 0 differ from the model's own, between 0 and 16895"),
        (own[:-1], r"rows for block 0: 16895 of 8 values, torch.float32; the model has 16896 of 8, torch.float32"),
        (own.half(), r"rows for block 0: 16896 of 8 values, torch.float16"),
        (own[:, :4].contiguous(), "rows for block 0: 16896 of 4 values"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            offload_table(model, "device", rows)
    assert table_of(model).weight.shape == own.shape


def test_models_that_have_none_and_tables_that_are_away(model):
    with pytest.raises(ValueError, match="a Linear with 0 text models of the class qwen4_exp"):
        offload_table(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="this model has no n-gram table"):
        offload_table(make_model(ple_layer_ids=[]))
    with pytest.raises(ValueError, match="placement 'file' needs rows that lie in a file"):
        offload_table(model, "file")
    with pytest.raises(ValueError, match="no placement 'disk'"):
        offload_table(model, "disk")
    with pytest.raises(ValueError, match="the weights of this model are not loaded"), torch.device("meta"):
        offload_table(qwen4.Qwen4ExpForCausalLM(text_config()))
    with offload_table(model, "device"):
        with pytest.raises(ValueError, match="the table of block 0 is offloaded already"):
            offload_table(model, "device")
        with pytest.raises(ValueError, match="a model whose table is offloaded cannot be copied"):
            copy.deepcopy(model)


def test_what_is_saved_without_the_rows_says_so(tmp_path):
    model = make_model(**TWO_TABLES)
    with offload_table(model, "device"), pytest.warns(UserWarning) as told:
        model.save_pretrained(tmp_path)
        assert not any("ngram_embedding.weight" in key for key in model.state_dict())
    assert [re.match(r"the n-gram table of block (\d) is offloaded", str(one.message))[1] for one in told] == list(
        "0202"
    )
    with warnings.catch_warnings(action="error"):
        assert sum("ngram_embedding.weight" in key for key in model.state_dict()) == 2


def test_a_model_of_another_dtype_than_its_rows_is_refused(model):
    ids = ids_of(1, 9)
    expected = logits(model, ids)
    with offload_table(model, "host"):
        model.to("cpu", torch.float64)
        with pytest.raises(ValueError, match=r"^the model was made torch\.float64 while .* stay torch\.float32: "):
            logits(model, ids)
        assert torch.equal(logits(model.float(), ids), expected)


class Adapted(nn.Module):
    """As LoRA wraps an embedding (peft): its weight is the wrapped one's."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, numbers):
        return self.base_layer(numbers) + 1


def test_a_table_that_is_wrapped_is_refused(model):
    embedding, table = model.model.layers[0].ple.ple_embedding, table_of(model)
    embedding.ngram_embedding = Adapted(table)
    try:
        with pytest.raises(ValueError, match=r"^the table of block 0 is wrapped in a tests\..*\.Adapted, as by adap"):
            offload_table(model, "host")
    finally:
        embedding.ngram_embedding = table


def test_a_table_module_that_was_compiled_is_the_table():
    model, ids = make_model(), ids_of(1, 9)
    expected, embedding = logits(model, ids), model.model.layers[0].ple.ple_embedding
    embedding.ngram_embedding = torch.compile(embedding.ngram_embedding, backend="eager")
    with offload_table(model, "host"):
        assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("given", [False, True])
def test_a_table_that_is_sharded_is_refused(given):
    """Given rows would be compared with it."""
    model = make_model()
    rows = table_of(model).weight.detach()
    table_of(model).weight = nn.Parameter(TwoTensor(rows, rows))
    with pytest.raises(ValueError, match=r"a model's own table is offloaded before the model is sharded"):
        offload_table(model, "host", rows if given else None)


def test_a_table_of_other_primes_is_refused(model):
    sizes = model.model.layers[0].ple.ple_embedding.head_vocab_sizes
    sizes[0], sizes[1] = sizes[1], sizes[0]
    try:
        with pytest.raises(ValueError, match="this transformers hashes otherwise than the tested ones"):
            offload_table(model, "device")
    finally:
        sizes[0], sizes[1] = sizes[1], sizes[0]


def test_rows_of_our_own_table_are_the_models(model):
    """What arrives is what the parameter holds, for the padded rows at the end too."""
    own = table_of(model).weight.detach()
    with make_table("host", own) as table:
        numbers = torch.tensor([0, 16_895, 7, 7])
        assert torch.equal(table.start(numbers).wait(), own[numbers])


def test_a_model_that_was_made_in_inference_mode_goes_on_in_it():
    with torch.inference_mode():
        model, ids = make_model(), ids_of(2, 17)
        want = model(ids).logits
        offload_table(model, placement="device").restore()
        assert torch.equal(model(ids).logits, want)
