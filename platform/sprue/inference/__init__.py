"""What travels to production: feature spec, backbone engines, calibration and the detector; no Ray, MLflow or DVC."""
