"""Writes the plan of each class: the recipe's settings, or the best that a search finds."""

from sprue.stages.runtime import run_stage

if __name__ == "__main__":
    run_stage("search")
