"""Images a second of a worker, where its time goes, and how near that is to the machine's limit.

    python tests/benchmarks/run_bench.py preset=sd15 batch_sizes=[8,16] dtype=float16

Architectures are built in full size from their published configurations with random weights: values
do not matter for speed, and nothing is downloaded.
"""
