"""What the scripts in ``pipelines/`` call: arguments, the connection to Ray, DVC."""
