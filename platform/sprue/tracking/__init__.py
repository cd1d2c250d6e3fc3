"""MLflow: runs, packaged models and the registry."""
