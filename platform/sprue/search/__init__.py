"""The search for a class's best flow, by the detection of synthetic defects on its validation images."""
