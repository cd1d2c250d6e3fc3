"""The search for a class's best flow, by the detection of drawn defects on its validation pictures."""
