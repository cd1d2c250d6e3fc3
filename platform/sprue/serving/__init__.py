"""Scoring over HTTP: the champions of all classes behind one Ray Serve application."""
