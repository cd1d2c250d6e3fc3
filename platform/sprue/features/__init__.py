"""The frozen backbone runs once for each image; tables keep its maps."""
