"""Features once: the frozen backbone runs a single time for each picture, and its maps are kept in tables."""
