"""Readers of caption corpora: COCO JSON, CSV, TSV, JSON Lines, Parquet, plain text, WebDataset.

spec = CorpusSpec(path="s3://bucket/captions/*.parquet", caption_column="TEXT")
for record in read_captions(spec): ...      # Caption, or Dropped with its reason
identify(spec)                              # the corpus's part of a fingerprint
"""

from ovref.corpora.corpus_identity import identify
from ovref.corpora.readers import read_captions
from ovref.corpora.spec import CorpusSpec

__all__ = ["CorpusSpec", "identify", "read_captions"]
