"""Calibrates the fitted flows on held-out good images and measures them once on the test split."""

from sprue.stages.runtime import run_stage

if __name__ == "__main__":
    run_stage("evaluate")
