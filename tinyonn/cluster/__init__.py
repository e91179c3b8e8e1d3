"""Cluster: k-means over all scored weights; see `tinyonn.cluster.stage.cluster_run`."""
