"""From folders of pictures to a manifest: layouts, splits, drawn defects and the embedded textures."""
