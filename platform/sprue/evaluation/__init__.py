"""Calibrates and evaluates fitted flows; writes metrics, images and reports."""
