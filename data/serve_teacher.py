"""Serves a GGUF over the OpenAI protocol on loopback, as a teacher for `dypo generate teachers` (engine `openai`).

    python data/serve_teacher.py --gguf models/smollm2.gguf [--port 8191] [--ctx 8192] [--parallel 8] [--threads 2]

Prints one line, the base_url to put into the recipe (http://127.0.0.1:PORT/v1), once it answers; serves until SIGTERM or
Ctrl-C and then exits with 0. llama.cpp does the work (package xllamacpp, extra `real`); its own log goes to stderr with
`--verbose`. It asks for no key and listens on 127.0.0.1 only: reach it from another machine through a tunnel, not by opening it.
"""

import argparse
import importlib.util
import os
import signal
import socket
import sys
import threading
from pathlib import Path

HOST = "127.0.0.1"


def main() -> int:
    parser = argparse.ArgumentParser(description="serve a GGUF over the OpenAI protocol on loopback")
    parser.add_argument("--gguf", type=Path, required=True, help="the model")
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--ctx", type=int, default=8192, help="context in tokens, divided among the parallel requests")
    parser.add_argument("--parallel", type=int, default=8, help="requests decoded together")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--verbose", action="store_true", help="llama.cpp's own log, on stderr")
    args = parser.parse_args()
    if not args.gguf.is_file():
        raise SystemExit(f"{args.gguf}: no such file. data/fetch_smollm2.py makes models/smollm2.gguf")
    if importlib.util.find_spec("xllamacpp") is None:
        raise SystemExit("xllamacpp is not installed: install the extra `real` (pip install -e '.[real]')")
    port = args.port or _free_port()
    if not _is_free(port):
        raise SystemExit(f"port {port} on {HOST} is taken: another server? Choose another, or 0 for a free one")

    stop = threading.Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, lambda *_: stop.set())
    server = start(args.gguf, port, args.ctx, args.parallel, args.threads, args.verbose)
    print(server.listening_address + "/v1", flush=True)
    while not stop.wait(1.0):  # a bare wait() would hold signals back
        pass
    print("stopped", file=sys.stderr, flush=True)
    os._exit(0)  # nothing here to save, and llama.cpp's teardown of busy slots may take long


def start(gguf: Path, port: int, ctx: int, parallel: int, threads: int, verbose: bool):
    """A server that answers already; it lives in threads of this process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.hostnames = [HOST]
    params.port = port
    params.n_ctx = ctx
    params.n_parallel = parallel
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.warmup = False
    params.verbosity = 3 if verbose else 0
    try:
        return xllamacpp.Server(params)
    except RuntimeError as reason:
        raise SystemExit(
            f"{gguf}: llama.cpp cannot serve it ({reason}). Is it a whole GGUF? --verbose shows its log"
        ) from None


def _free_port() -> int:
    with socket.socket() as s:
        s.bind((HOST, 0))
        return s.getsockname()[1]


def _is_free(port: int) -> bool:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((HOST, port))
        except OSError:
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
