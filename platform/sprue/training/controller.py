"""What the controller of a run of Ray Train does besides. It imports neither torch nor a flow."""

from typing import Any

import ray
from ray.actor import ActorHandle
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup


class RoomKeeper(ControllerCallback, WorkerGroupCallback):
    """Removes the placement group of a run that ends while its workers are started.

    When a worker dies after it was created and before it has the function that it is to run, Ray Train (2.60) ends the
    run, and leaves the placement group until the whole job ends: nobody gets those cores meanwhile, this job's other
    worker groups included, which wait for them forever.
    """

    def __init__(self) -> None:
        self._rooms: list[PlacementGroup] = []

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        """Remembers the group."""
        self._rooms.append(worker_group.get_worker_group_state().placement_group_handle.placement_group)

    async def before_controller_shutdown(self) -> None:
        """Removes all; those that Ray Train has removed stay so."""
        for room in self._rooms:
            remove_placement_group(room)


class Announcement(ControllerCallback):
    """Tells the queue which actor controls a worker group's run, so that the driver can kill it."""

    def __init__(self, queue: ActorHandle, group: int) -> None:
        self._queue, self._group = queue, group

    def after_controller_start(self, train_run_context: Any) -> None:
        """Announces this actor."""
        self._queue.announce.remote(self._group, ray.get_runtime_context().current_actor)
