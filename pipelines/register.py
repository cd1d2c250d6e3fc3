"""Registers every evaluated detector that the registry does not hold."""

from sprue.stages.runtime import run_stage

if __name__ == "__main__":
    run_stage("register")
