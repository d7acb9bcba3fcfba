"""The engine on Ray: its cluster, its workers, what it runs besides shards, its metrics."""
