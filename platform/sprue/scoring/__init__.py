"""Scores any number of images on the cluster, to Parquet."""
