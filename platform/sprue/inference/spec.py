"""The feature spec: everything that a feature's value depends on, and its fingerprint."""

import hashlib
import json

from pydantic import Field

from sprue.config import FeatureSettings

# Version 1: 8-bit RGB; resized to a square, bicubic with antialiasing; scales by mean pooling; float32, rounded to
# float16 maps. A test pins a small numerical result to the version.
PREPROCESSING_VERSION = 1
"""Changes with the code that decodes, resizes and rounds: features of different versions never mix."""


class FeatureSpec(FeatureSettings):
    """Resolved feature settings: those of a backbone whose weights have been read; see `backbone.resolve`."""

    weights_digest: str = Field(pattern="^[0-9a-f]{64}$")
    """SHA-256 of the loaded parameters."""
    mean: tuple[float, ...]
    """Mean of each colour, 0..1, in the images that the weights were trained on."""
    std: tuple[float, ...]
    """Standard deviation of each colour."""

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify the features, wherever the weights were read from."""
        facts = self.model_dump(mode="json", exclude={"weights"}) | {"preprocessing": PREPROCESSING_VERSION}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
