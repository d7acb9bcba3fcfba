"""Whole builds on an S3 server where a tenth of the requests fails or is answered too late.

    python tests/benchmarks/spoilt_s3.py [--seeds 0 1 2] [--captions 24] [--probability 0.1]
        [--partition-references 5]

The server is moto's on the loopback, behind a proxy that spoils requests by chance, each in one of
four ways (`FAULTS` of `tests/pipelines/faulty_s3.py`). The build has cheap fake stages and, as
`ovref build`, is started again where it ends with an error that may pass. It counts as good if
every file of every step and of the collection is byte for byte that of an undisturbed build in a
folder, and every input of every step has exactly one answer. Retries of botocore and s3fs are as
they come; only time-outs are shorter (`S3_OPTIONS`). `--output` adds the run to a list of runs.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

from kills import FAKES, SHARD_SIZE, add_partitions, partitions_in, record, reduction

sys.path.insert(0, FAKES)
import s3fs
from faulty_s3 import FaultyS3
from moto.server import ThreadedMotoServer
from recipe_fakes import (
    S3_KEYS,
    S3_OPTIONS,
    answered_once,
    build_through,
    content_of,
    fake_build,
    finish,
)

LATE_S = 2.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--captions", type=int, default=24)
    parser.add_argument("--probability", type=float, default=0.1)
    add_partitions(parser)
    parser.add_argument("--output", help="JSON file of results")
    options = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # or it logs every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    os.environ.update(S3_KEYS, AWS_ENDPOINT_URL=url)
    s3fs.S3FileSystem().mkdir("bucket")
    builds = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "undisturbed")
        folder.mkdir()
        fields = {"reduce": reduction(options)}
        undisturbed = fake_build(folder, options.captions, SHARD_SIZE, **fields)
        finish(undisturbed)
        wanted = content_of(undisturbed)
        for seed in options.seeds:
            folder = Path(scratch, str(seed))
            folder.mkdir()
            output = f"s3://bucket/seed{seed}"
            config = fake_build(folder, options.captions, SHARD_SIZE, output=output, **fields)
            began = time.monotonic()
            with FaultyS3(url, options.probability, seed, LATE_S) as proxy:
                times = build_through(config, proxy.url)
            builds.append(
                {
                    "seed": seed,
                    "times_started": times,
                    "requests": dict(sorted(proxy.requests.items())),
                    "identical": content_of(config) == wanted,
                    "answered_once": answered_once(config),
                    "seconds": round(time.monotonic() - began, 1),
                }
            )
            print(builds[-1], flush=True)
    server.stop()
    result = {
        "probability": options.probability,
        "late_answers_s": LATE_S,
        "botocore": S3_OPTIONS,
        "captions": options.captions,
        "shard_size": SHARD_SIZE,
        **partitions_in(wanted, options),
        "files": len(wanted),
        "builds": builds,
    }
    record(result, options.output)
    good = all(build["identical"] and build["answered_once"] for build in builds)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
