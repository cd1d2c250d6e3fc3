"""Whether all nodes of a Ray cluster have the same packages: unlike ones give unlike weights and scores."""

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sprue.errors import SprueError
from sprue.operations.findings import Finding
from sprue.stages.runtime import connect_ray

COMPARED = ("ray", "torch", "timm", "openvino", "numpy", "mlflow", "FrEIA")
TIMEOUT_S = 60.0
"""How long the nodes may take to start a process and answer."""


def compare_nodes() -> list[Finding]:
    """Asks each node of the cluster that RAY_ADDRESS names for its versions, and compares them with those here."""
    try:
        connect_ray()
    except SprueError as error:
        return [Finding("FAIL", "nodes", str(error))]

    # By value, so that it runs on nodes that have no sprue.
    compared = COMPARED

    def ask() -> dict[str, str]:
        import importlib.metadata
        import platform

        found = {each.metadata["Name"].lower(): each.version for each in importlib.metadata.distributions()}
        return {"Python": platform.python_version()} | {name: found.get(name.lower(), "missing") for name in compared}

    task = ray.remote(num_cpus=0)(ask)
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(): address
        for node, address in nodes.items()
    }
    answered, late = ray.wait(list(asked), num_returns=len(asked), timeout=TIMEOUT_S)
    findings = [Finding("FAIL", "nodes", f"{asked[each]} does not answer within {TIMEOUT_S:g} s") for each in late]
    here, same = ask(), 0
    for reference in answered:
        there = ray.get(reference)
        unlike = [f"{name} {there[name]}, here {here[name]}" for name in here if there[name] != here[name]]
        same += not unlike
        if unlike:
            words = f"{asked[reference]} has {'; '.join(unlike)}: install the same on all nodes"
            findings.append(Finding("WARN", "nodes", words))
    ray.shutdown()
    return [Finding("OK", "nodes", f"{same} of {len(nodes)} nodes have the versions that are here"), *findings]
