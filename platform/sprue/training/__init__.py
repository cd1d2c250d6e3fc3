"""Fits one flow per product class on Ray Train."""
