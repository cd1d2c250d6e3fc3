"""Engines that run the backbone: OpenVINO on CPUs, torch on GPUs and where OpenVINO fails.

Shapes: B images, S side of the input, C channels, H rows, W columns of a map.
"""

import ctypes
import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sprue.errors import SprueError
from sprue.inference.cache import cache_folder, keep
from sprue.inference.spec import FeatureSpec

logger = logging.getLogger(__name__)

EngineName = Literal["auto", "openvino", "torch"]

CONVERSION_TOLERANCE = 1e-3
"""A converted backbone whose maps differ by more than this fraction of their largest value is not used."""


class Engine(Protocol):
    """Runs a backbone on batches of images."""

    name: str

    def __call__(self, images_BSS3: NDArray[np.uint8]) -> list[NDArray[np.float16]]:
        """The maps [B, C, H, W] of 8-bit images [B, S, S, 3], in the order of `Backbone.forward`."""
        ...


def build_engine(spec: FeatureSpec, name: EngineName = "auto", threads: int | None = None) -> Engine:
    """Builds the fastest engine on this machine, or the named one.

    Args:
        spec: The feature spec.
        name: ``auto`` takes torch where there is a GPU, else OpenVINO, else torch.
        threads: CPU threads; by default all cores that the process may use.

    Raises:
        SprueError: If the backbone can't be loaded, or OpenVINO is named and can't run it.
    """
    if name == "torch":
        return TorchEngine(spec, threads)
    if name == "auto" and _has_gpu():
        return TorchEngine(spec, threads)
    try:
        return OpenVINOEngine(spec, threads)
    except ConversionError as error:
        if name == "openvino":
            raise
        logger.warning("%s; running it on torch, which is several times slower on a CPU", error)
        return TorchEngine(spec, threads)


def _has_gpu() -> bool:
    """Whether torch has a GPU. Without a driver, the seconds of its import are saved."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        if not Path("/dev/kfd").exists():  # AMD's
            return False
    import torch

    return torch.cuda.is_available()


class ConversionError(SprueError):
    """OpenVINO is not installed or can't run this backbone."""


class TorchEngine:
    """Runs the backbone on torch in float32, with channels last; see `sprue.inference.precision`."""

    name = "torch"

    def __init__(self, spec: FeatureSpec, threads: int | None = None) -> None:
        """Loads the backbone; see `sprue.inference.backbone.load_backbone` for what can go wrong."""
        import torch

        from sprue.inference.backbone import load_backbone
        from sprue.inference.precision import use_full_precision

        use_full_precision()
        if threads:
            torch.set_num_threads(threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.backbone = load_backbone(spec).to(self.device).to(memory_format=torch.channels_last)

    def __call__(self, images_BSS3: NDArray[np.uint8]) -> list[NDArray[np.float16]]:
        """See `Engine`."""
        import torch

        with torch.inference_mode():
            maps = self.backbone(torch.from_numpy(images_BSS3).to(self.device, non_blocking=True))
        return [map_BCHW.to(torch.float16).cpu().contiguous().numpy() for map_BCHW in maps]


class OpenVINOEngine:
    """Runs the backbone on OpenVINO, with float32 execution pinned; one call at a time, others wait.

    It runs image by image: few on all threads in turn, and many on a thread each. So an image's maps do not depend on
    its batch. The backbone is converted once for each fingerprint and cached; see `sprue.inference.cache`.
    """

    name = "openvino"

    def __init__(self, spec: FeatureSpec, threads: int | None = None) -> None:
        """Compiles the backbone, which is converted unless the cache has it.

        Raises:
            ConversionError: If OpenVINO is missing, or can't convert the backbone, or its maps differ from torch's.
        """
        try:
            import openvino
        except ImportError as error:
            raise ConversionError("OpenVINO is not installed") from error
        path = cache_folder() / f"{spec.fingerprint}-openvino-{openvino.__version__.split('-')[0]}" / "backbone.xml"
        if not path.exists():
            convert(spec, path.parent)
        threads = threads or len(os.sched_getaffinity(0))
        core = openvino.Core()
        model = core.read_model(path)
        # On two cores, 16 images at 384 pixels take 4/5 of the time that one call with a batch of them takes.
        model.reshape([1, spec.input_size, spec.input_size, 3])
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        latency = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}
        throughput = {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": str(threads)}
        self.request = core.compile_model(model, "CPU", settings | latency).create_infer_request()
        self.queue = openvino.AsyncInferQueue(core.compile_model(model, "CPU", settings | throughput), threads)
        self.shapes = [tuple(output.shape[1:]) for output in self.request.model_outputs]
        self.lock = threading.Lock()

    def __call__(self, images_BSS3: NDArray[np.uint8]) -> list[NDArray[np.float16]]:
        """See `Engine`."""
        return self._run(images_BSS3, np.float16)

    def run(self, images_BSS3: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """The maps before rounding."""
        return self._run(images_BSS3, np.float32)

    def _run(self, images_BSS3: NDArray[np.uint8], dtype: type[np.floating[Any]]) -> list[NDArray[Any]]:
        # The queue's requests read the images in place, so these must lie as OpenVINO expects them, and stay.
        images_B1SS3 = np.ascontiguousarray(images_BSS3)[:, None]
        outputs = [np.empty((len(images_B1SS3), *shape), dtype) for shape in self.shapes]

        def store(request: Any, index: int) -> None:
            for map_BCHW, tensor in zip(outputs, request.output_tensors, strict=True):
                map_BCHW[index] = tensor.data[0]

        with self.lock:
            if len(images_B1SS3) < len(self.queue):
                for index, image_1SS3 in enumerate(images_B1SS3):
                    self.request.infer([image_1SS3], share_inputs=True)
                    store(self.request, index)
                return outputs
            self.queue.set_callback(store)
            try:
                for index, image_1SS3 in enumerate(images_B1SS3):
                    self.queue.start_async([image_1SS3], index, share_inputs=True)
            finally:
                self.queue.wait_all()
        return outputs


@contextmanager
def _root_logger_restored() -> Iterator[None]:
    """Restores the root logger: OpenVINO's converter silences it, and does not restore it where it fails."""
    root = logging.getLogger()
    level, filters, handlers = root.level, root.filters[:], root.handlers[:]
    try:
        yield
    finally:
        root.setLevel(level)
        root.filters[:], root.handlers[:] = filters, handlers


def convert(spec: FeatureSpec, folder: Path) -> None:
    """Converts a backbone to OpenVINO's format in `folder`, and checks it against torch on an image of noise.

    Raises:
        ConversionError: If it can't be converted, or its outputs differ from torch's.
    """
    import openvino
    import torch

    from sprue.inference.backbone import load_backbone

    backbone = load_backbone(spec)
    side = spec.input_size
    probe_1SS3 = torch.randint(
        0, 256, (1, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    logger.info("converting %s to OpenVINO, once for this feature spec", spec.backbone)
    with torch.inference_mode(), _root_logger_restored():
        expected = backbone(probe_1SS3)
        try:
            model = openvino.convert_model(backbone, example_input=probe_1SS3, input=[(-1, side, side, 3)])
            results = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(probe_1SS3.numpy())
        except Exception as error:  # OpenVINO's errors have no other class in common
            raise ConversionError(f"OpenVINO can't convert {spec.backbone}: {error}") from error
    for index, map_1CHW in enumerate(expected):
        worst = float((torch.from_numpy(results[index]) - map_1CHW).abs().max() / map_1CHW.abs().max())
        if not worst <= CONVERSION_TOLERANCE:
            raise ConversionError(
                f"OpenVINO's output {index} of {spec.backbone} differs from torch's by {worst:.1e} of its range"
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    openvino.save_model(model, temporary / "backbone.xml", compress_to_fp16=False)
    keep(temporary, folder)
