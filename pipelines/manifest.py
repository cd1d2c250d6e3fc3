"""Reads the dataset's folders into the manifest: one row an image, with its split."""

from sprue.stages.runtime import run_stage

if __name__ == "__main__":
    run_stage("manifest")
