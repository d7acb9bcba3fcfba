"""The tables of VOCSeg and RetCLIP in small: `python tests/benchmarks/run_paper_tables.py`."""
