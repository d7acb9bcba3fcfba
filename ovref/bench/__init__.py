"""How fast a worker draws, where its time goes, and how near that is to what the machine can do.

    ovref bench preset=sd15 batch_sizes=[8,16] dtype=float16 output=bench.json
    python -m ovref.bench ...        # the same without Ray, from a checkout

Architectures are built in full size from their published configurations with random weights: values
do not matter for speed, and nothing is downloaded.
"""
