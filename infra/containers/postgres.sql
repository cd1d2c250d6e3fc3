-- MLflow keeps its accounts apart from its runs: the two have migrations of their own.
CREATE DATABASE mlflow_auth;
