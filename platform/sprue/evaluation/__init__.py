"""Calibrates and evaluates fitted flows; writes figures and pictures, logs nothing."""
