"""Counts extracted images. The counter is a Ray actor, and its process imports nothing else of sprue."""


class ImageCounter:
    """Counts the images that engines have processed; an image that is processed again after a failure counts once."""

    def __init__(self) -> None:
        self.images: set[tuple[str, str]] = set()

    def add(self, images: list[tuple[str, str]]) -> None:
        """Adds images, by class and digest."""
        self.images.update(images)

    def count(self) -> int:
        """Number of images so far."""
        return len(self.images)
