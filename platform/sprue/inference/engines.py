"""Engines that run the backbone: OpenVINO on CPUs, torch on GPUs and where OpenVINO fails.

Shapes: B images, S side of the input, C channels, H rows, W columns of a map.
"""

import logging
import os
import tempfile
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

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
"""OpenVINO's names of precisions."""

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
    if name == "auto":
        import torch

        if torch.cuda.is_available():
            return TorchEngine(spec, threads)
    try:
        return OpenVINOEngine(spec, threads)
    except ConversionError as error:
        if name == "openvino":
            raise
        logger.warning("%s; running it on torch, which is several times slower on a CPU", error)
        return TorchEngine(spec, threads)


class ConversionError(SprueError):
    """OpenVINO is not installed or can't run this backbone."""


class TorchEngine:
    """Runs the backbone on torch in the spec's precision, with channels last; see `sprue.inference.precision`."""

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
        self.is_mixed = spec.precision == "bfloat16"

    def __call__(self, images_BSS3: NDArray[np.uint8]) -> list[NDArray[np.float16]]:
        """See `Engine`."""
        import torch

        mixed = torch.autocast(self.device.type, torch.bfloat16, self.is_mixed)
        with torch.inference_mode(), mixed:
            maps = self.backbone(torch.from_numpy(images_BSS3).to(self.device, non_blocking=True))
        return [map_BCHW.to(torch.float16).cpu().contiguous().numpy() for map_BCHW in maps]


class OpenVINOEngine:
    """Runs the backbone on OpenVINO, image by image: on all threads one, and of several one on each thread.

    So an image's maps are the same to the bit, whatever its batch. The backbone is converted once for each fingerprint
    and cached; see `sprue.inference.cache`.
    """

    name = "openvino"

    def __init__(self, spec: FeatureSpec, threads: int | None = None) -> None:
        """Compiles the backbone, which is converted unless the cache has it.

        Raises:
            ConversionError: If OpenVINO is missing, can't convert the backbone or compute in its precision here, or its
                maps differ from torch's.
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
        # A static shape is a tenth faster than any number of images, and a thread for each image faster than all
        # threads for each: see `benchmarks/extraction.py`.
        model = core.read_model(path)
        model.reshape([1, spec.input_size, spec.input_size, 3])

        def compiled(hint: str, streams: int) -> Any:
            settings = {"PERFORMANCE_HINT": hint, "NUM_STREAMS": str(streams), "INFERENCE_NUM_THREADS": threads}
            return core.compile_model(model, "CPU", settings | {"INFERENCE_PRECISION_HINT": PRECISIONS[spec.precision]})

        self.alone = compiled("LATENCY", 1)
        used = self.alone.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if used != PRECISIONS[spec.precision]:
            raise ConversionError(
                f"features.precision: this CPU has no {spec.precision}, OpenVINO would compute in {used}"
            )
        self.request = self.alone.create_infer_request()
        self.queue = openvino.AsyncInferQueue(compiled("THROUGHPUT", threads), threads)

    def __call__(self, images_BSS3: NDArray[np.uint8]) -> list[NDArray[np.float16]]:
        """See `Engine`."""
        return self._run(images_BSS3, np.float16)

    def run(self, images_BSS3: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """The maps before rounding."""
        return self._run(images_BSS3, np.float32)

    def _run(self, images_BSS3: NDArray[np.uint8], dtype: type[np.floating[Any]]) -> list[NDArray[Any]]:
        outputs = [np.empty((len(images_BSS3), *output.shape[1:]), dtype) for output in self.alone.outputs]

        def store(request: Any, index: int) -> None:
            for map_BCHW, tensor in zip(outputs, request.output_tensors, strict=True):
                map_BCHW[index] = tensor.data[0]

        if len(images_BSS3) == 1:
            self.request.infer([images_BSS3], share_inputs=True)
            store(self.request, 0)
            return outputs
        self.queue.set_callback(store)
        for index in range(len(images_BSS3)):
            self.queue.start_async([images_BSS3[index : index + 1]], index, share_inputs=True)
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
