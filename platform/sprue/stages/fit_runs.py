"""The runs on the tracking server of the fits that a stage does."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sprue.stages.runtime import Context
from sprue.tracking.provenance import provenance
from sprue.tracking.runs import FitRun
from sprue.tracking.server import experiment_id
from sprue.tracking.writer import TrackingWriter
from sprue.training.loop import Epoch
from sprue.training.plan import ClassPlan
from sprue.training.spec import FitSpec


class FitRuns:
    """A run for each fit; and one for each class that has folds, whose fits' runs are below it.

    A run is opened when there is something to say of its fit, and forgotten when the fit has ended: the first fits do
    not wait until the server has made thousands of runs, and this process holds those of the running fits alone. A
    server that does not answer stops no fit: the next epoch, or the register stage, logs what is missing.
    """

    def __init__(self, context: Context, plans: Sequence[ClassPlan], specs: Sequence[FitSpec]) -> None:
        """Opens no run yet."""
        self._experiment = experiment_id(context.dataset, context.store)
        self._plans = {plan.class_name: plan for plan in plans}
        self._specs = {spec.name: spec for spec in specs}
        self._tags: dict[tuple[str, str], dict[str, str]] = {}
        self._open: dict[str, FitRun] = {}
        self._parents: dict[str, FitRun] = {}
        self._history: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        self._writer = TrackingWriter()

    def log_epoch(self, name: str, epoch: Epoch) -> None:
        """Logs the epoch of a fit, and those before it that the server did not take."""
        self._history[name].append(asdict(epoch))
        self._writer.submit(self._log_epochs, self._specs[name], list(self._history[name]))

    def complete(self, spec: FitSpec, history: Sequence[Mapping[str, Any]]) -> None:
        """Logs all epochs of a fit that is done. The class's run goes on in later stages; that of a fold ends."""
        self._history.pop(spec.name, None)
        self._writer.submit(self._complete, spec, history)

    def fail(self, spec: FitSpec) -> None:
        """Ends the run of a fit that has failed, and that of its class."""
        self._history.pop(spec.name, None)
        self._writer.submit(self._fail, spec)

    def close(self) -> None:
        """Waits until all is written."""
        self._writer.close()

    def _log_epochs(self, spec: FitSpec, history: Sequence[Mapping[str, Any]]) -> None:
        self._run(spec).log_epochs(history)

    def _complete(self, spec: FitSpec, history: Sequence[Mapping[str, Any]]) -> None:
        run = self._run(spec)
        run.log_epochs(history)
        if spec.fold:
            run.end("FINISHED")
        del self._open[spec.name]

    def _fail(self, spec: FitSpec) -> None:
        self._run(spec).end("FAILED")
        if spec.fold:
            self._parent(spec).end("FAILED")
        del self._open[spec.name]

    def _run(self, spec: FitSpec) -> FitRun:
        if spec.name not in self._open:
            parent = self._parent(spec).run_id if spec.fold else None
            self._open[spec.name] = FitRun.open(
                self._experiment, spec.name, spec.key, spec.params, self._tags_of(spec), parent
            )
        return self._open[spec.name]

    def _parent(self, spec: FitSpec) -> FitRun:
        name, plan = spec.class_name, self._plans[spec.class_name]
        if name not in self._parents:
            self._parents[name] = FitRun.open(self._experiment, name, plan.key, plan.params, self._tags_of(spec))
        return self._parents[name]

    def _tags_of(self, spec: FitSpec) -> dict[str, str]:
        """The same for all classes of a manifest; to find them takes a process of git."""
        facts = (spec.manifest, spec.features.fingerprint)
        if facts not in self._tags:
            self._tags[facts] = provenance(*facts)
        return self._tags[facts]
