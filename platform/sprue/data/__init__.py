"""From folders of images to a manifest: layouts, samples, splits and synthetic defects."""
