"""Commands on the stand-in without waiting for imports: a server that has torch and transformers forks for each.

    python -m tests.rehearsal.server SOCKET                 the server; ends with its standard input
    python tests/rehearsal/server.py SOCKET COMMAND ...     a client: as `python -m tests.rehearsal COMMAND ...`

The command runs with the client's files, folder and environment, gets the SIGINT and SIGTERM that the client gets, and
is killed when the client is.
"""

import array
import functools
import gc
import json
import os
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(path: str) -> None:
    """Fork for every connection until standard input ends."""
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    import transformers
    from transformers.models.qwen3 import modeling_qwen3

    from tests.rehearsal import install

    install.install()
    import matplotlib.backends.backend_svg
    import matplotlib.pyplot
    import numba
    import torch._inductor.cudagraph_trees
    import triton.experimental.gluon

    from bench import gpu_wall, lookup_speed
    from bench.gpu import preflight
    from bench.instruments.code_digest import code_sha256
    from bench.setup import streams
    from engram_ref.fusion import kernels as fusion
    from engram_ref.hashing import fused
    from engram_ref.lookup import kernels as lookup

    # Imported once, here; what a child changes in them, it changes for itself.
    assert transformers and modeling_qwen3 and matplotlib and numba and gpu_wall and lookup_speed and preflight
    assert torch._inductor.cudagraph_trees and triton.experimental.gluon and fusion and fused and lookup
    streams.load_tokenizer = functools.cache(streams.load_tokenizer)  # one, which nobody changes
    assert streams.load_tokenizer(None) and code_sha256("bench.gpu_wall")  # which keeps what each file imports
    gc.freeze()  # commands collect garbage after each pass, and all that was imported would be looked through
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how they ended: clients are told
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    while True:
        connection, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            os._exit(_child(connection))
        connection.close()


def _child(connection: socket.socket) -> int:
    """Run one command; its exit status goes to the client and is returned."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the server was started without
    request, files = _receive(connection)
    for number, file in enumerate(files):
        os.dup2(file, number)
    files_of = enumerate(("r", "w", "w"))  # open until the process ends
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, buffering=1, closefd=False) for n, mode in files_of)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"], TRITON_INTERPRET="1")
    threading.Thread(target=_obey, args=(connection,), daemon=True).start()
    status = _status_of(request["arguments"])
    sys.stdout.flush(), sys.stderr.flush()
    connection.sendall(bytes([status]))
    return status


def _status_of(arguments: list[str]) -> int:
    from tests.rehearsal import install, toy
    from tests.rehearsal.__main__ import run

    sys.path[:0] = [folder for folder in os.environ.get("PYTHONPATH", "").split(":") if folder]
    status: object = 0
    try:
        toy.shrink()
        run(arguments)
    except SystemExit as error:
        status = error.code
    except KeyboardInterrupt:
        status = 130
    except Exception:
        traceback.print_exc()
        status = 1
    print(install.report(), *install.RUNTIME.refused, sep="\n", file=sys.stderr)
    return status if isinstance(status, int) else 0 if status is None else 1


def _obey(connection: socket.socket) -> None:
    """Signals of the client; its end is the end of the command."""
    while got := connection.recv(1):
        os.kill(os.getpid(), got[0])
    os.kill(os.getpid(), signal.SIGKILL)


def _receive(connection: socket.socket) -> tuple[dict, list[int]]:
    length, files, _, _ = socket.recv_fds(connection, 8, 3)
    left, parts = int.from_bytes(length, "big"), []
    while left:
        parts.append(connection.recv(left))
        left -= len(parts[-1])
    return json.loads(b"".join(parts)), files


def ask(path: str, arguments: list[str]) -> int:
    """Run a command on the server; its exit status."""
    request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    text = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
        connection.sendmsg([len(text).to_bytes(8, "big")], ancillary)
        connection.sendall(text)
        for number in _SIGNALS:
            signal.signal(number, lambda got, frame: connection.sendall(bytes([got])))
        status = connection.recv(1)
    return status[0] if status else 137


if __name__ == "__main__":
    if len(sys.argv) == 2:
        sys.path.insert(0, str(Path(__file__).parents[2]))
        serve(sys.argv[1])
    sys.exit(ask(sys.argv[1], sys.argv[2:]))
