"""Datasets that are generated from scikit-image's photographs."""
