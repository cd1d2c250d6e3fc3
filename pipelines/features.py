"""Runs the frozen backbone over the images whose features are not stored yet."""

from sprue.stages.runtime import run_stage

if __name__ == "__main__":
    run_stage("features")
