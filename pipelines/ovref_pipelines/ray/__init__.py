"""The engine on Ray: cluster, workers, tasks of the reduction, metrics."""
