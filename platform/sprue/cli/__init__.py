"""The command ``sprue``; a module for each concern.

Commands import what they need when they run, so that help and mistakes appear at once.
"""

from sprue.cli import decisions, operations, pipeline, registry, scoring, service
from sprue.cli.group import main

__all__ = ["decisions", "main", "operations", "pipeline", "registry", "scoring", "service"]
