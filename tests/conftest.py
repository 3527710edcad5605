"""What several test files share: golden files, vocabularies, plans and the two backends of the hash.

Imports that are not in the standard library stay inside the fixtures, so that the tests of the plain-Python
twin also collect where none of them is installed. No test touches the network.
"""

import functools
import gc
import json
import lzma
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.pop("COLUMNS", None)  # readline, which pytest imports, exports a terminal's, and tables would be cut to it
os.unsetenv("COLUMNS")  # it does so behind os.environ's back
# Read as torch is imported: tensors are so small that several threads are slower, and forked children can use none.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Torch reads both when it is imported. What it compiles is worth keeping, code for other vectors apart, as it would be
# run. Whether the compiler knows this processor's vectors takes it a program to find out, 6 s; if not, it says so.
_CODE = f"engram-tests-inductor-{os.environ.get('ATEN_CPU_CAPABILITY', 'own')}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), _CODE)))
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"
if not os.path.exists("/dev/nvidiactl"):  # no GPU: Triton's kernels run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Until tests begin: what is imported stays, and is looked through again and again, 1.4 s in each worker.
gc.disable()

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module", autouse=True)
def _quicker():
    """What tests wait for and are not about: no part of it changes what they find."""
    gc.freeze()  # what was there before a module is not looked at by each collection of it, half a second
    gc.enable()
    if "triton.runtime.interpreter" in sys.modules:
        from tests.interpreter import repeat_nothing

        repeat_nothing()
    guards: Any = sys.modules.get("torch._dynamo.guards")
    if guards:  # how long a guard takes, which a log is told; caches are flushed before, 25 ms for each graph
        guards.profile_guard_manager = lambda *_: 0.0
    reading: Any = sys.modules.get("engram_ref.vocab.tokenizer_file")
    if reading and not hasattr(reading.parse, "cache_info"):  # a text takes a quarter of a second
        parse = functools.lru_cache(maxsize=4)(reading.parse)
        reading.parse = sys.modules["engram_ref.vocab.compressed"].parse = parse  # type: ignore[attr-defined]


@pytest.fixture(scope="session", autouse=True)
def _scratch(tmp_path_factory):
    """Temporary folders, also those of examples in pages and of other processes, go where pytest clears away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("scratch")))
        patch.setattr(tempfile, "tempdir", None)  # found anew at the next call
        yield


@pytest.fixture(scope="session")
def golden():
    """Read a JSON file of tests/golden by its name; every caller gets a copy of its own."""
    return lambda name: json.loads((GOLDEN / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def small_tokenizer():
    """Folder of the 8,182-id tokenizer."""
    return GOLDEN / "tokenizer_small"


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory):
    """What XDG_CACHE_HOME is for this run of the tests, in all its workers; maps are kept in its folder `engram`."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def kept_maps(cache_home):
    """For a module whose tests, or the processes that they start, look for maps where a user's are."""
    # Not for all: matplotlib's list of fonts, which takes it seconds to make, follows this variable, too.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache_home))
        yield


@pytest.fixture(scope="session")
def vocab_v4(cache_home):
    from engram_ref.vocab import CompressedVocab

    return CompressedVocab.from_tokenizer(cache_dir=cache_home / "engram")


@pytest.fixture(scope="session")
def vocab_v3(cache_home, tmp_path_factory):
    from engram_ref.vocab import CompressedVocab

    file = tmp_path_factory.mktemp("v3") / "tokenizer.json"
    file.write_bytes(lzma.decompress((GOLDEN / "deepseek_v3_tokenizer.json.xz").read_bytes()))
    return CompressedVocab.from_tokenizer(file, cache_dir=cache_home / "engram")


@pytest.fixture(scope="session")
def vocab_small(small_tokenizer, cache_home):
    from engram_ref.vocab import CompressedVocab

    return CompressedVocab.from_tokenizer(small_tokenizer, cache_dir=cache_home / "engram")


@pytest.fixture(scope="session")
def plans(vocab_v4):
    """The plan of every preset with the DeepSeek-V4 vocabulary; that of form qwen with its own token ids."""
    from engram_ref.config import PRESETS, EngramConfig
    from engram_ref.hashing import HashPlan
    from engram_ref.vocab import vocab_for

    configs = {name: EngramConfig.preset(name) for name in PRESETS}
    vocabs = {name: vocab_for(c) if c.form == "qwen" else vocab_v4 for name, c in configs.items()}
    return {name: HashPlan.build(c, len(vocabs[name]), vocabs[name].pad(c.pad_id)) for name, c in configs.items()}


@pytest.fixture(scope="session")
def sample_folder(tmp_path_factory, cache_home):
    """A small checkpoint in DeepSeek-V4.1's layout, seed 3; tests do not change it."""
    from engram_ref.checkpoint.sample import sample_config, write_sample

    folder = tmp_path_factory.mktemp("sample") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache_home))
        write_sample(folder, sample_config(first_prime=31, hidden=32), seed=3)
    return folder


@pytest.fixture(params=["numpy", "numba"])
def backend(request):
    """Both backends of engram_ref's NgramHasher; a missing numba is an error here, not a skip."""
    return request.param
