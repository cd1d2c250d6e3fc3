"""Fits one flow per class on the stored features, side by side on Ray Train."""

from sprue.stages.runtime import run_stage

if __name__ == "__main__":
    run_stage("fit")
