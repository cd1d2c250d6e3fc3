"""sprue: trains, registers and serves normalizing-flow defect detectors, one per product class, on a Ray cluster."""
