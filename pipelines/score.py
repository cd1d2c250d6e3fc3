"""Scores all images of a folder or s3 URL with a registered detector: ``sprue score``, as a Ray job."""

import sys

from sprue.cli import main

if __name__ == "__main__":
    main(["score", *sys.argv[1:]], prog_name="sprue")
