"""The chart renders objects that Kubernetes and KubeRay take, and refuses values that would harm."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from sprue.serving.application import ServiceArguments
from sprue.serving.launch import PROXY_GRACE_S

SCHEMAS = json.loads((Path(__file__).parent / "kuberay" / "schemas.json").read_text())
FILES = ("laptop", "one-gpu", "plant")
RUN = "pipeline.run=r1,pipeline.dataset=bolts,pipeline.data=s3://plant/bolts,pipeline.params=datasets: {}"
KUBERNETES = "1.34"
FOREIGN = ("kueue.x-k8s.io", "monitoring.coreos.com")
"""Groups of which there are no schemas here."""

Objects = list[dict[str, Any]]
Render = Callable[..., Objects]


def of_kind(objects: Objects, kind: str) -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each for each in objects if each["kind"] == kind}


def pod_specs(value: Any) -> Iterator[dict[str, Any]]:
    """Every specification of a pod in an object, however deep."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for each in value.values():
            yield from pod_specs(each)
    elif isinstance(value, list):
        for each in value:
            yield from pod_specs(each)


@pytest.mark.parametrize("name", FILES)
def test_the_chart_passes_helms_own_check(lint: Callable[..., Any], name: str) -> None:
    done = lint(name, RUN)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", FILES)
def test_every_object_is_one_that_kubernetes_or_kuberay_takes(render: Render, name: str) -> None:
    kinds = set()
    for each in render(name, RUN):
        kind, group = each["kind"], each["apiVersion"].partition("/")[0]
        kinds.add(kind)
        if group == "ray.io":
            schema = {**SCHEMAS["kinds"][kind], "$defs": SCHEMAS["$defs"]}
            found = jsonschema.Draft7Validator(schema).iter_errors(each)
            assert not [f"{list(error.absolute_path)}: {error.message}" for error in found], kind
        elif group not in FOREIGN:
            kubernetes_validate.validate(each, KUBERNETES, strict=True)
    assert {"RayService", "RayJob", "NetworkPolicy", "PodDisruptionBudget", "PriorityClass"} <= kinds


def test_the_schemas_refuse_a_field_that_does_not_exist(render: Render) -> None:
    service = json.loads(json.dumps(next(iter(of_kind(render("plant", RUN), "RayService").values()))))
    service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["container"] = []
    schema = {**SCHEMAS["kinds"]["RayService"], "$defs": SCHEMAS["$defs"]}
    assert not jsonschema.Draft7Validator(schema).is_valid(service)


@pytest.mark.parametrize("name", FILES)
def test_pods_are_restricted_and_bounded_and_their_images_pinned(render: Render, name: str) -> None:
    specs = [spec for each in render(name, RUN) for spec in pod_specs(each)]
    assert len(specs) > 6
    for spec in specs:
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"]
            assert not security["allowPrivilegeEscalation"]
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert "memory" in container["resources"]["limits"]
            assert ("@sha256:" in container["image"]) == (name != "laptop"), container["image"]
            writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
            assert "/tmp" in writable, "the rest of the file system is read-only"


@pytest.mark.parametrize("name", FILES)
def test_secrets_are_named_and_never_values(render: Render, name: str) -> None:
    objects = render(name, RUN)
    assert not of_kind(objects, "Secret")
    secret = ("PASSWORD", "TOKEN", "SECRET", "ACCESS_KEY", "USERNAME", "BACKEND_STORE_URI")
    for each in objects:
        for spec in pod_specs(each):
            for variable in (variable for container in spec["containers"] for variable in container.get("env", [])):
                if any(word in variable["name"] for word in secret) and not variable["name"].endswith("_FILE"):
                    assert "secretKeyRef" in variable.get("valueFrom", {}), variable
    clusters = [each["spec"]["rayClusterConfig"] for each in of_kind(objects, "RayService").values()]
    clusters += [each["spec"]["rayClusterSpec"] for each in of_kind(objects, "RayJob").values()]
    clusters += [each["spec"] for each in of_kind(objects, "RayCluster").values()]
    assert len(clusters) >= 7
    assert all(each["authOptions"] == {"mode": "token", "secretName": "sprue-ray"} for each in clusters)


@pytest.mark.parametrize("name", FILES)
def test_the_service_gets_arguments_that_it_knows(render: Render, name: str) -> None:
    (service,) = of_kind(render(name), "RayService").values()
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (app,) = config.applications
    arguments = ServiceArguments.model_validate(app.args)
    assert app.import_path == "sprue.serving.application:application"
    assert config.http_options.request_timeout_s == 60 + PROXY_GRACE_S
    assert "line-scoring-serve-svc.plant" in arguments.allowed_hosts
    pods = list(pod_specs(service))
    for pod in pods:  # the keys are where the service looks for them, and the whole folder, so that it can follow them
        (mount,) = (each for each in pod["containers"][0]["volumeMounts"] if each["name"] == "keys")
        assert str(arguments.keys) == f"{mount['mountPath']}/keys.json"
        assert "subPath" not in mount
    scaling = app.deployments[0].autoscaling_config
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    needs = app.deployments[0].ray_actor_options
    fitting = 0
    for group in groups:
        (pod,) = pod_specs(group)
        requests = pod["containers"][0]["resources"]["requests"]
        fit = int(requests["cpu"]) // needs.num_cpus
        if needs.num_gpus:
            fit = min(fit, int(requests.get("nvidia.com/gpu", 0)) // needs.num_gpus)
        assert fit, "a worker without a replica is never ready"
        fitting += group["replicas"] * fit
    assert scaling["min_replicas"] <= fitting, "the first replicas fit on the first workers"
    (budget,) = of_kind(render(name), "PodDisruptionBudget").values()
    assert budget["spec"]["minAvailable"] < sum(group["replicas"] for group in groups), "a node can be drained"


def test_requests_are_traced_where_there_is_a_collector(render: Render) -> None:
    def environments(*values: str) -> list[dict[str, str]]:
        (service,) = of_kind(render("plant", *values), "RayService").values()
        named = (pod["containers"][0]["env"] for pod in pod_specs(service))
        return [{each["name"]: each.get("value", "") for each in env if "OTEL" in each["name"]} for env in named]

    assert set(map(len, environments())) == {0}
    for environment in environments("serving.tracing.endpoint=http://otel:4318"):
        assert environment == {
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://otel:4318",
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": "0.01",
        }


def test_an_upgrade_of_a_plant_is_incremental_and_its_state_outlives_a_head(render: Render) -> None:
    (service,) = of_kind(render("plant"), "RayService").values()
    strategy = service["spec"]["upgradeStrategy"]
    assert strategy["type"] == "NewClusterWithIncrementalUpgrade"
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["enableInTreeAutoscaling"]
    options = cluster["gcsFaultToleranceOptions"]
    assert options["redisPassword"] == {"valueFrom": {"secretKeyRef": {"name": "sprue-valkey", "key": "password"}}}
    (budget,) = of_kind(render("plant"), "PodDisruptionBudget").values()
    assert budget["spec"]["minAvailable"] == 1
    labels = cluster["workerGroupSpecs"][0]["template"]["metadata"]["labels"]
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()


@pytest.mark.parametrize("name", ["one-gpu", "plant"])
def test_training_can_not_take_what_serving_needs(render: Render, name: str) -> None:
    objects = render(name, RUN)
    queues = of_kind(objects, "ClusterQueue")
    serving, training = queues["line-serving"]["spec"], queues["line-training"]["spec"]
    assert serving["cohortName"] == training["cohortName"]
    for each in serving["resourceGroups"][0]["flavors"][0]["resources"]:
        assert each["lendingLimit"] == 0, "what serving is promised is lent to nobody"
    for each in training["resourceGroups"][0]["flavors"][0]["resources"]:
        assert each["borrowingLimit"] == 0
    assert serving["preemption"]["borrowWithinCohort"] == {"policy": "LowerPriority"}
    assert training["preemption"]["reclaimWithinCohort"] == "Never"
    priorities = of_kind(objects, "WorkloadPriorityClass")
    assert priorities["line-serving"]["value"] > priorities["line-training"]["value"]
    assert of_kind(objects, "PriorityClass")["line-training"]["preemptionPolicy"] == "Never"
    # What names no queue, as the jobs that a RayCronJob makes, is given to the queue of this name.
    assert of_kind(objects, "LocalQueue")["default"]["spec"]["clusterQueue"] == "line-training"
    label = "kueue.x-k8s.io/queue-name"
    for kind, queue in (("RayService", "line-serving"), ("RayJob", "default"), ("RayCluster", "default")):
        assert {each["metadata"]["labels"][label] for each in of_kind(objects, kind).values()} <= {queue}
    for job in of_kind(objects, "RayJob").values():  # Kueue admits them as a whole, and refuses others
        assert not job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"]


@pytest.mark.parametrize("name", FILES)
def test_nothing_talks_but_what_a_policy_names(render: Render, name: str) -> None:
    objects = render(name, RUN)
    policies = of_kind(objects, "NetworkPolicy")
    denied = policies["line-deny"]["spec"]
    assert set(denied) == {"podSelector", "policyTypes"}
    assert denied["policyTypes"] == ["Ingress", "Egress"]
    everything = denied["podSelector"]["matchLabels"].items()
    labels = [each["template"]["metadata"]["labels"] for each in templates(objects)]
    assert len(labels) > 6
    assert all(everything <= each.items() for each in labels), "no pod escapes the policy that denies"
    for policy in policies.values():
        for rule in policy["spec"].get("ingress", []):
            assert rule.get("from"), f"{policy['metadata']['name']} lets everybody in"
        for rule in policy["spec"].get("egress", []):
            assert rule.get("to"), f"{policy['metadata']['name']} lets out to everywhere"


def templates(value: Any) -> Iterator[dict[str, Any]]:
    """Every object with the template of a pod."""
    if isinstance(value, dict):
        if "spec" in (value.get("template") or {}):
            yield value
        if "submitterPodTemplate" in value:
            yield {"template": value["submitterPodTemplate"]}
        for each in value.values():
            yield from templates(each)
    elif isinstance(value, list):
        for each in value:
            yield from templates(each)


def test_each_stage_is_a_job_and_the_nightly_check_a_cron_job(render: Render) -> None:
    objects = render("plant", RUN)
    stages = ["manifest", "features", "search", "fit", "evaluate", "register"]
    jobs = of_kind(objects, "RayJob")
    assert list(jobs) == [f"line-{stage}-r1" for stage in stages]
    where = "--params /etc/sprue/params/params.yaml --data s3://plant/bolts --store s3://plant-inspection/store"
    assert jobs["line-fit-r1"]["spec"]["entrypoint"] == f"sprue stage fit --dataset bolts {where}"
    assert not of_kind(render("plant"), "RayJob"), "an installation alone runs nothing"
    (nightly,) = of_kind(objects, "RayCronJob").values()
    assert nightly["spec"]["schedule"] == "30 2 * * *"


def test_what_the_laptop_bundles_is_what_its_pods_are_told(render: Render) -> None:
    objects = render("laptop")
    services = of_kind(objects, "Service")
    (pod, *_) = pod_specs(of_kind(objects, "RayService"))
    environment = {each["name"]: each.get("value") for each in pod["containers"][0]["env"]}
    for name, service in (("MLFLOW_TRACKING_URI", "line-mlflow"), ("AWS_ENDPOINT_URL", "line-s3")):
        (port,) = services[service]["spec"]["ports"]
        assert environment[name] == f"http://{service}:{port['port']}"
    (job,) = pod_specs(of_kind(objects, "Job"))
    assert environment["SPRUE_STORE"] == "s3://sprue/store"
    assert '"sprue"' in job["containers"][0]["command"][-1], "the store's bucket is made"


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("laptop", "serving.replicas.min=zero", "got string, want integer"),
        ("laptop", "serving.replica.min=1", "additional properties 'replica' not allowed"),
        ("laptop", "secrets.ray=", "secrets/ray"),
        ("laptop", "tracking.uri=http://user:word@mlflow", "tracking/uri"),
        ("laptop", "store=/mnt/store", "store"),
        ("laptop", "image.scoring.digest=sha256:1", "image/scoring/digest"),
        ("plant", "image.scoring.digest=", "image.scoring.digest is not set: pin the image"),
        ("plant", "tracking.uri=", "tracking.uri is not set, and MLflow is not bundled"),
        ("plant", "serving.ingress.tlsSecret=", "keys do not travel in clear text"),
        ("one-gpu", "serving.gpuFraction=1", "the group cpu of serving.workerGroups has no GPUs"),
        ("plant", "kueue.elastic=false", "NewClusterWithIncrementalUpgrade needs clusters that grow"),
        ("one-gpu", f"{RUN},training.workerGroups[0].replicas=0", "training.workerGroups have no replicas"),
        ("one-gpu", "networkPolicy.apiServerCidr=", "networkPolicy.apiServerCidr is not set"),
    ],
)
def test_wrong_values_are_refused(template: Callable[..., Any], name: str, wrong: str, said: str) -> None:
    done = template(name, wrong)
    assert done.returncode != 0
    assert said in done.stderr


def test_monitoring_keeps_what_prometheus_keeps_elsewhere(render: Render) -> None:
    objects = render("plant")
    local = yaml.safe_load((Path(__file__).parents[2] / "infra" / "prometheus" / "prometheus.yaml").read_text())
    (kept,) = local["scrape_configs"][0]["metric_relabel_configs"]
    heads = of_kind(objects, "ServiceMonitor")["line-heads"]["spec"]["endpoints"]
    workers = of_kind(objects, "PodMonitor")["line-workers"]["spec"]["podMetricsEndpoints"]
    for (endpoint,) in (heads, workers):
        assert endpoint["metricRelabelings"][0]["regex"] == kept["regex"]
        assert endpoint["relabelings"] == [
            {"targetLabel": "job", "replacement": local["scrape_configs"][0]["job_name"]}
        ]


def test_the_alerts_are_those_of_the_local_stack(render: Render) -> None:
    alerts = yaml.safe_load((Path(__file__).parents[2] / "infra" / "prometheus" / "alerts.yaml").read_text())
    (rule,) = of_kind(render("plant"), "PrometheusRule").values()
    assert rule["spec"] == alerts
    assert rule["metadata"]["labels"]["release"] == "prometheus"
