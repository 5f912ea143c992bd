"""The S3 tier against bare obstore: the same bytes, the same number of threads, one server.

The server is moto's, in Python: its speed is what bounds both, and the ratio is what is measured.
Bare obstore neither verifies what it reads nor puts it where it is wanted; ours does both.
"""

import argparse
import http.client
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

from bench.runner import Row, interleave
from bench.tiers.disk import Frames
from bench.tiers.valkey import TABLE, TIMEOUT_S, move, rows, started
from kvengine.config import Objects
from kvengine.metrics import Metrics
from kvengine.tiers.objects import ObjectsClient
from kvengine.tiers.remote import RemoteTier

MOTO = "import sys; from moto.server import main; main(['-H', '127.0.0.1', '-p', sys.argv[1]])"


def run(options: argparse.Namespace) -> list[Row]:
    """Measure one table of 16 frames of 2 MiB, written and read."""
    from obstore.store import S3Store

    frames = Frames(TABLE)
    keys = frames.name()
    sources = [
        span.frame[: span.nbytes] for span in frames.spans(frames.source, keys, range(TABLE))
    ]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    with started([sys.executable, "-c", MOTO, str(port)], port):
        make_bucket(port)
        endpoint = f"http://127.0.0.1:{port}"
        config = Objects(
            url="s3://blocks/ours",
            endpoint=endpoint,
            region="us-east-1",
            key_id="id",
            secret_key="key",
            timeout_s=TIMEOUT_S,
        )
        bare = S3Store(
            "blocks",
            prefix="bare",
            endpoint=endpoint,
            region="us-east-1",
            access_key_id="id",
            secret_access_key="key",
            client_options={"allow_http": True},
        )
        metrics = Metrics()
        tier = RemoteTier(
            ObjectsClient(config),
            metrics,
            lambda keys: None,
            prefix="",
            threads=config.connections,
            timeout_s=TIMEOUT_S,
        )
        with ThreadPoolExecutor(config.connections) as pool:

            def bare_put() -> None:
                put = [
                    pool.submit(bare.put, str(index), source, use_multipart=False)
                    for index, source in enumerate(sources)
                ]
                assert all(done.result() for done in put)

            def bare_get() -> list[object]:
                return list(pool.map(lambda index: bare.get(str(index)).bytes(), range(TABLE)))

            try:
                put = interleave(
                    {
                        "bare": bare_put,
                        "ours": lambda: move(
                            tier.write, frames.spans(frames.source, keys, range(TABLE))
                        ),
                    },
                    options.rounds,
                )
                get = interleave(
                    {
                        "bare": bare_get,
                        "ours": lambda: move(
                            tier.read, frames.spans(frames.target, keys, range(TABLE))
                        ),
                    },
                    options.rounds,
                )
                same = [bytes(body) for body in bare_get()] == [bytes(s) for s in sources]
            finally:
                tier.close()
        same &= frames.target[:] == frames.source[:]
        same &= metrics.get("tier_failures") == metrics.get("corrupt_blocks") == 0
    nbytes = sum(len(source) for source in sources)
    return [
        *rows("s3 put 2MiB x16", put, nbytes, same),
        *rows("s3 get 2MiB x16", get, nbytes, same),
    ]


def make_bucket(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("PUT", "/blocks")
    assert connection.getresponse().status == 200
    connection.close()
