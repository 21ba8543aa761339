"""The chart without a cluster: every mode renders to manifests that Kubernetes knows, says only settings that exist,
shows no secret, and guards its pods. And the Containerfile, read as text.
"""

from __future__ import annotations

import json
import re
import runpy
import shutil
import tomllib
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from entitlement.errors import InvalidArgument
from gateway import settings as gateway_settings
from ledger_sync import settings as sync_settings
from tests.pages import ROOT

helm_python = pytest.importorskip("helm_python", reason="Helm's SDK has no wheel for this machine")

import kubernetes_validate  # noqa: E402

from tests.charts import (  # noqa: E402
    CASES,
    CHART,
    Document,
    case,
    containers,
    documents,
    one,
    pods,
    rendered,
    variables,
    with_dependency,
)

KUBERNETES = ("1.30.0", "1.34.0", "1.37.0")  # the oldest that the chart allows, to the newest with a schema
MODES = ("deployment", "daemonset", "sidecar")
SETTINGS = {"ENTITLEMENT_GATEWAY_": gateway_settings, "ENTITLEMENT_SYNC_": sync_settings}
# What is not for a chart's user to say: the secret comes as a variable.
LEFT_OUT: dict[str, set[str]] = {
    "gateway": {"redis_password_file"},
    "ledgerSync": {"redis_password_file", "webhook_secret_file"},
}
TRIAL: dict[str, Any] = {"trial": {"enabled": True}, "access": {"anonymous": "all"}}
NEEDED: dict[str, Any] = {
    "access": {"secretName": "access"},
    "redis": {"urlSecret": {"name": "redis"}},
    "postgresql": {"urlSecret": {"name": "ledger"}},
}
SECRET = re.compile(r"URL|SECRET|PASSWORD|PUBLISHER|TOKEN")  # variables whose values may be one
NAME = "shop-entitlement-gateway"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> list[Document]:
    """The example: an application with gateways in its pods."""
    return documents({}, with_dependency(tmp_path_factory.mktemp("helm")))


@pytest.fixture(scope="module")
def everything(app: list[Document]) -> list[Document]:
    """All that is made in any case, the example's too."""
    return [*app, *(document for name in CASES for document in case(name))]


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(helm_python.HelmError) as error:
        rendered(NEEDED | values)
    return str(error.value)


@pytest.fixture(scope="module", autouse=True)
def schemas_are_read_once() -> Iterator[None]:
    """They are large, and read anew for each document otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kubernetes_validate.utils, "schema_contents", cache(kubernetes_validate.utils.schema_contents))
        yield


def validate(document: Document) -> None:
    for version in KUBERNETES:
        kubernetes_validate.validate(document, version, strict=True)


def test_lint_has_nothing_to_say() -> None:
    report = helm_python.lint(CHART, NEEDED, strict=True)
    assert report["total_charts_linted"] == 1 and not report["errors"]
    assert [found["error"] for found in report["messages"]] == ["icon is recommended"]


def test_every_mode_has_a_case() -> None:
    told = {yaml.safe_load(path.read_text()).get("mode", "deployment") for path in CASES.values()}
    assert told == set(MODES) == set(schema("mode")["enum"])


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_known_to_three_versions_of_kubernetes(name: str) -> None:
    found = case(name)
    assert len(found) >= 9
    for document in found:
        if document["apiVersion"] != "monitoring.coreos.com/v1":
            validate(document)


def test_the_example_is_known_to_kubernetes(app: list[Document]) -> None:
    for document in app:
        validate(document)


def test_a_misspelt_field_is_not_known_to_kubernetes() -> None:
    document = deepcopy(one(case("deployment"), "Deployment", NAME))
    document["spec"]["template"]["spec"]["containers"][0]["imagePulPolicy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePulPolicy"):
        validate(document)


@pytest.mark.parametrize(
    ("name", "kind"), [("deployment", "Deployment"), ("daemonset", "DaemonSet"), ("claim", "StatefulSet")]
)
def test_the_gateway_is_what_its_mode_says(name: str, kind: str) -> None:
    (pod,) = one(case(name), kind, NAME)["spec"]["template"]["spec"]["containers"]
    assert pod["command"] == ["python", "-P", "-m", "gateway"]
    assert variables(pod)["ENTITLEMENT_GATEWAY_LISTEN"]["value"] == "0.0.0.0:8080"


def test_callers_of_a_node_reach_the_gateway_of_that_node() -> None:
    assert one(case("daemonset"), "Service", NAME)["spec"]["internalTrafficPolicy"] == "Local"
    assert "internalTrafficPolicy" not in one(case("deployment"), "Service", NAME)["spec"]


def test_a_sidecar_starts_first_ends_last_and_is_reached_on_loopback_alone(app: list[Document]) -> None:
    assert not [each for each in case("sidecar") if each["kind"] in ("Deployment", "Service") and _name(each) == NAME]
    pod = one(app, "Deployment", "shop")["spec"]["template"]["spec"]
    (sidecar,), (application,) = pod["initContainers"], pod["containers"]
    assert sidecar["restartPolicy"] == "Always" and "readinessProbe" not in sidecar
    assert variables(sidecar)["ENTITLEMENT_GATEWAY_LISTEN"]["value"] == "127.0.0.1:8080"
    assert "ENTITLEMENT_GATEWAY_INSECURE" not in variables(sidecar)
    assert variables(application)["ENTITLEMENT_ADDRESS"]["value"] == "127.0.0.1:8080"


def test_a_sidecar_of_a_chart_in_another_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(helm_python.HelmError, match=r"entitlement-gateway\.mode is not sidecar"):
        rendered({"entitlement-gateway": {"mode": "deployment"}}, with_dependency(tmp_path))


def test_every_variable_of_ours_is_a_setting(everything: list[Document]) -> None:
    said = {name for container in containers(everything) for name in variables(container)}
    ours = {name for name in said if name.startswith("ENTITLEMENT_") and name != "ENTITLEMENT_ADDRESS"}
    known = {f"{prefix}{field.upper()}" for prefix, of in SETTINGS.items() for field in of.Settings.__struct_fields__}
    assert ours <= known
    assert {prefix for prefix in SETTINGS if any(name.startswith(prefix) for name in ours)} == set(SETTINGS)


@pytest.mark.parametrize(("prefix", "part"), [("ENTITLEMENT_GATEWAY_", "gateway"), ("ENTITLEMENT_SYNC_", "ledgerSync")])
def test_every_setting_can_be_said_once(everything: list[Document], prefix: str, part: str) -> None:
    """By a value of its own, a Secret, or under `settings` by its name."""
    fields = set(SETTINGS[prefix].Settings.__struct_fields__)
    free = set(schema(part, "settings")["properties"])
    said = {name for container in containers(everything) for name in variables(container) if name.startswith(prefix)}
    fixed = {name.removeprefix(prefix).lower() for name in said} - free
    assert free <= fields
    assert fields - free - fixed <= LEFT_OUT[part]


@pytest.mark.parametrize(("prefix", "part"), [("ENTITLEMENT_GATEWAY_", "gateway"), ("ENTITLEMENT_SYNC_", "ledgerSync")])
def test_the_schema_has_the_bounds_of_the_settings(prefix: str, part: str) -> None:
    for name, said in schema(part, "settings")["properties"].items():
        within: list[object] = said.get("enum", [said["minimum"], said["maximum"]] if "minimum" in said else [])
        for value in within:
            assert loaded(prefix, name, value) == value
        for value in [said["minimum"] - 1, said["maximum"] + 1] if "minimum" in said else []:
            with pytest.raises(InvalidArgument, match=name):
                loaded(prefix, name, value)


def loaded(prefix: str, name: str, value: object) -> object:
    given = {f"{prefix}{name.upper()}": str(value), f"{prefix}ANONYMOUS": "all"}
    return getattr(SETTINGS[prefix].load(given), name)


@pytest.mark.parametrize("name", CASES)
def test_the_processes_take_what_they_are_told(name: str) -> None:
    """Their own check of all settings together; of Secrets, something of the right shape."""
    shapes = {"REDIS_URL": "rediss://:p@x:6379/0", "DATABASE_URL": "postgresql://x/y", "PUBLISHER": "none:"}
    shapes |= {"WEBHOOK_URL": "https://example.com/", "WEBHOOK_SECRET": "whsec_c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0"}
    for container in containers(case(name)):
        for prefix, of in SETTINGS.items():
            said = {key: each for key, each in variables(container).items() if key.startswith(prefix)}
            said.pop("ENTITLEMENT_GATEWAY_FRONTDOOR", None)  # a file
            if not said:
                continue  # It is another process.
            values = (each.get("value", shapes.get(key.removeprefix(prefix))) for key, each in said.items())
            found = of.load(dict(zip(said, values, strict=True)))
            if container.get("command", [""])[-1] == "ledger_sync":
                sync_settings.check_access(found)


@pytest.mark.parametrize("name", CASES)
def test_who_may_call_is_mounted_to_be_read_or_nobody_is_asked(name: str) -> None:
    values = yaml.safe_load(CASES[name].read_text())["access"]
    for container in containers(case(name)):
        said = variables(container)
        for process in {"gateway", "ledger_sync"} & {container.get("command", [""])[-1]}:
            prefix = "ENTITLEMENT_GATEWAY_" if process == "gateway" else "ENTITLEMENT_SYNC_"
            mounts = [each for each in container["volumeMounts"] if each["name"] == "entitlement-access"]
            if values.get("anonymous") == "all" or (values.get("anonymous"), process) == ("gateway", "gateway"):
                assert said[f"{prefix}ANONYMOUS"]["value"] == "all" and not mounts
            else:
                file = f"/etc/entitlement/access/{values.get('key', 'access.yaml')}"
                assert said[f"{prefix}ACCESS"]["value"] == file and f"{prefix}ANONYMOUS" not in said
                assert [(each["mountPath"], each["readOnly"]) for each in mounts] == [("/etc/entitlement/access", True)]


def test_ledger_admin_is_plaintext_only_where_it_has_no_certificate() -> None:
    for name, tls in (("tls", True), ("deployment", False)):
        (sync,) = (each for each in containers(case(name)) if each["name"] == "ledger-sync")
        assert ("ENTITLEMENT_SYNC_INSECURE" in variables(sync)) is not tls
        assert ("ENTITLEMENT_SYNC_TLS_CERT" in variables(sync)) is tls
        assert ("grpc" in sync["readinessProbe"]) is not tls  # The kubelet speaks no TLS for gRPC.


def test_variables_that_kubernetes_adds_for_a_service_are_kept_out(everything: list[Document]) -> None:
    assert all(pod["spec"]["enableServiceLinks"] is False for pod in pods(everything))


def test_secrets_are_named_and_never_shown(everything: list[Document]) -> None:
    for container in containers(everything):
        for name, variable in variables(container).items():
            if SECRET.search(name):
                assert "value" not in variable and variable["valueFrom"]["secretKeyRef"]["name"], name


def test_three_planted_secrets_are_found_nowhere_but_in_their_secret() -> None:
    planted = {"valkeyPassword": "canary-hot", "postgresqlPassword": "canary-ledger"}
    texts = rendered(TRIAL | {"trial": {"enabled": True, **planted}})
    secret, rest = texts["trial.yaml"].split("\n---\n", 1)
    assert all(f":{value}@" in secret for value in planted.values())
    shown = rest + "".join(text for name, text in texts.items() if name != "trial.yaml")
    assert "canary" not in shown
    third = refusal({"redis": {"urlSecret": {"name": "redis://:canary-url@redis:6379/0"}}})
    assert "urlSecret" in third  # A URL where a Secret's name belongs is not rendered at all.


def test_passwords_of_a_trial_are_drawn() -> None:
    first, second = (one(documents(TRIAL), "Secret", f"{NAME}-trial") for _ in range(2))
    assert len(first["stringData"]["valkey-password"]) == 24
    assert first["stringData"]["valkey-password"] != second["stringData"]["valkey-password"]


def test_no_pod_may_more_than_it_needs(everything: list[Document]) -> None:
    for pod in pods(everything):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    guarded = [container for container in containers(everything) if container["name"] != "app"]
    assert len(guarded) > 20
    for container in guarded:
        security = container["securityContext"]
        assert security["runAsNonRoot"] and security["runAsUser"] > 0 and security["readOnlyRootFilesystem"]
        assert security["allowPrivilegeEscalation"] is False and security["capabilities"] == {"drop": ["ALL"]}
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]["cpu"]


def test_every_volume_that_is_mounted_is_there(everything: list[Document]) -> None:
    for document in everything:
        if "template" in document.get("spec", {}):
            spec = document["spec"]["template"]["spec"]
            claims = [claim["metadata"]["name"] for claim in document["spec"].get("volumeClaimTemplates", [])]
            there = [volume["name"] for volume in spec.get("volumes", [])] + claims
            mounted = {mount["name"] for each in containers([document]) for mount in each.get("volumeMounts", [])}
            assert mounted == set(there) and len(there) == len(set(there)), _name(document)


def test_services_budgets_and_policies_select_pods_that_exist(everything: list[Document]) -> None:
    made = [pod["metadata"]["labels"] for pod in pods(everything)]
    for document in everything:
        selector = (
            document["spec"].get("selector") or document["spec"].get("podSelector") if "spec" in document else None
        )
        if selector and document["kind"] in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
            wanted = selector.get("matchLabels", selector)
            assert any(wanted.items() <= labels.items() for labels in made), _name(document)


def test_monitors_find_ports_that_are_there() -> None:
    values = {"metrics": {"serviceMonitor": {"enabled": True}}}
    for mode, kind in (("deployment", "ServiceMonitor"), ("sidecar", "PodMonitor")):
        found = documents(NEEDED | values | {"mode": mode})
        monitors = [document for document in found if document["kind"] in ("PodMonitor", "ServiceMonitor")]
        assert sorted(monitor["kind"] for monitor in monitors) == sorted([kind, "ServiceMonitor"])
        for monitor in monitors:
            if monitor["kind"] == "PodMonitor":
                (end,) = monitor["spec"]["podMetricsEndpoints"]
                assert end["port"] == "ent-metrics"
                continue
            wanted = monitor["spec"]["selector"]["matchLabels"].items()
            services = [each for each in found if each["kind"] == "Service"]
            (end,) = monitor["spec"]["endpoints"]
            asked = [
                port["name"]
                for service in services
                if wanted <= service["metadata"]["labels"].items()
                for port in service["spec"]["ports"]
            ]
            assert asked.count(end["port"]) == 1


def test_a_sidecar_tells_its_figures_where_its_monitor_looks(app: list[Document]) -> None:
    (sidecar,) = (each for each in containers(app) if each["name"] == "entitlement-gateway")
    (port,) = sidecar["ports"]
    assert port["name"] == "ent-metrics"
    assert variables(sidecar)["ENTITLEMENT_GATEWAY_METRICS"]["value"] == f"0.0.0.0:{port['containerPort']}"


@pytest.mark.parametrize("name", [name for name in CASES if name != "tls"])
def test_a_policy_guards_every_pod(name: str) -> None:
    policies = [each["spec"] for each in case(name) if each["kind"] == "NetworkPolicy"]
    for pod in pods(case(name)):
        labels = pod["metadata"]["labels"].items()
        (policy,) = (each for each in policies if each["podSelector"]["matchLabels"].items() <= labels)
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        assert all(rule.get("from") for rule in policy.get("ingress", []))  # None is open to everyone.


def reaches(found: list[Document], source: str, target: str) -> bool:
    """By the policies of both ends, of a release whose servers are its own."""
    labels = {
        pod["metadata"]["labels"]["app.kubernetes.io/component"]: pod["metadata"]["labels"] for pod in pods(found)
    }

    def lets(end: str, way: str, peers: str, other: str) -> bool:
        policies = (each["spec"] for each in found if each["kind"] == "NetworkPolicy")
        (policy,) = (each for each in policies if each["podSelector"]["matchLabels"].items() <= labels[end].items())
        allowed = [peer for rule in policy.get(way, []) for peer in rule.get(peers, []) if "podSelector" in peer]
        wanted = [peer["podSelector"].get("matchLabels", {}).items() for peer in allowed]
        return any(each <= labels[other].items() for each in wanted)

    return lets(source, "egress", "to", target) and lets(target, "ingress", "from", source)


def test_policies_let_through_what_is_needed_and_no_more() -> None:
    hot, ledger = "trial-valkey", "trial-postgresql"
    ways = {
        ("gateway", hot),
        ("sync", hot),
        ("sync", ledger),
        ("migrate", ledger),
        ("test", "gateway"),
        ("test", "sync"),
    }
    sources, targets = ("gateway", "sync", "migrate", "test"), ("gateway", "sync", hot, ledger)
    found = case("trial")
    assert {(source, target) for source in sources for target in targets if reaches(found, source, target)} == ways


def test_nobody_but_the_test_may_call_ledger_admin_unless_it_is_said() -> None:
    admin = one(case("deployment"), "NetworkPolicy", f"{NAME}-sync")["spec"]["ingress"][0]
    assert [peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for peer in admin["from"]] == ["test"]


@pytest.mark.parametrize(("drain_ms", "pre_stop", "least"), [(5_000, 5, 10), (90_500, 0, 91), (0, 30, 30)])
def test_a_gateway_has_longer_to_end_than_it_drains(drain_ms: int, pre_stop: int, least: int) -> None:
    found = documents(NEEDED | {"gateway": {"settings": {"drain_ms": drain_ms}, "preStopSeconds": pre_stop}})
    spec = one(found, "Deployment", NAME)["spec"]["template"]["spec"]
    assert spec["terminationGracePeriodSeconds"] >= least + 30  # Envoy may take that long to end.
    sleeps = spec["containers"][0].get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    assert sleeps == pre_stop


def test_whole_numbers_stay_whole() -> None:
    """Helm reads them as floats."""
    found = documents(NEEDED | {"gateway": {"settings": {"max_message_bytes": 67_108_864, "remember_ms": 86_400_000}}})
    said = variables(next(containers([one(found, "Deployment", NAME)])))
    assert said["ENTITLEMENT_GATEWAY_MAX_MESSAGE_BYTES"]["value"] == "67108864"
    assert said["ENTITLEMENT_GATEWAY_REMEMBER_MS"]["value"] == "86400000"


def test_nothing_is_asked_of_health_to_stay_alive(everything: list[Document]) -> None:
    """A restart does not bring Redis or PostgreSQL back."""
    for container in containers(everything):
        assert "grpc" not in container.get("livenessProbe", {})
    gateway = next(containers([one(case("deployment"), "Deployment", NAME)]))
    assert gateway["readinessProbe"]["grpc"] == {"port": 8080}
    assert "grpc" not in next(containers([one(case("claim"), "StatefulSet", NAME)]))["readinessProbe"]  # listening


def test_tables_are_migrated_before_anything_else_is_changed() -> None:
    for name, when in (("deployment", "pre-install,pre-upgrade"), ("trial", "post-install,pre-upgrade")):
        job = one(case(name), "Job", f"{NAME}-migrate")
        assert job["metadata"]["annotations"]["helm.sh/hook"] == when
        (container,) = containers([job])
        assert container["command"][-2:] == ["ledger_sync", "migrate"]
        assert list(variables(container)) == ["ENTITLEMENT_SYNC_DATABASE_URL"]
    assert not [each for each in case("tls") if _name(each).endswith("migrate")]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"gatway": {}}, "gatway"),
        ({"gateway": {"replica": 1}}, "replica"),
        ({"gateway": {"settings": {"max_inflight": 1}}}, "max_inflight"),
        ({"gateway": {"settings": {"redis_url": "redis://x"}}}, "redis_url"),
        ({"gateway": {"settings": {"drain_ms": 600_001}}}, "drain_ms"),
        ({"image": {"tag": "latest"}}, "tag"),
        ({"runAsUser": 0}, "runAsUser"),
        ({"partitions": 1_025}, "partitions"),
        ({"mode": "job"}, "mode"),
        ({"ledgerSync": {"replicas": 5}}, "5: more than ledgerSync.settings.lanes, 4"),
        ({"mode": "daemonset", "gateway": {"receipts": {"kind": "claim"}}}, "claim needs mode: deployment"),
        ({"mode": "sidecar", "gateway": {"autoscaling": {"enabled": True}}}, "autoscaling.enabled needs mode"),
        ({"mode": "sidecar", "gateway": {"tls": {"secretName": "x"}}}, "of no use with mode: sidecar"),
        ({"gateway": {"tls": {"clientCa": True}}}, "clientCa needs gateway.tls.secretName"),
        ({"ledgerSync": {"tls": {"clientCa": True}}}, "clientCa needs ledgerSync.tls.secretName"),
        ({"access": {}}, "access.secretName is needed: the Secret with the file of identities"),
        ({"access": {"anonymous": "gateway"}}, "access.secretName is needed"),
        ({"access": {"anonymous": "all", "secretName": "x"}}, "all lets everybody in"),
        ({"access": {"anonymous": "some"}}, "anonymous"),
        ({"webhooks": {"urlSecret": {"name": "x"}}}, "signingSecret.name is needed"),
        ({"redis": {}}, "redis.urlSecret.name is needed"),
        ({"postgresql": {}}, "postgresql.urlSecret.name is needed"),
    ],
)
def test_what_cannot_work_is_refused(values: dict[str, Any], problem: str) -> None:
    assert problem in refusal(values)


def schema(*path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
    for name in path:
        found = found["properties"][name]
    return found


def closed(part: dict[str, Any], path: str = "") -> Iterator[str]:
    """The objects with fields of ours that take other fields, too."""
    if "properties" in part:
        if part.get("additionalProperties") is not False:
            yield path
        for name, below in part["properties"].items():
            yield from closed(below, f"{path}.{name}")


def test_the_schema_is_strict_and_knows_all_values() -> None:
    assert list(closed(schema())) == []
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def same(said: dict[str, Any], part: dict[str, Any], path: str) -> None:
        if "properties" in part and not path.endswith(".settings"):
            assert said.keys() | {"global"} == part["properties"].keys() | {"global"}, path
            for name, below in said.items():
                same(below, part["properties"][name], f"{path}.{name}")

    same(values, schema(), "values")


def test_the_notes_say_what_is_lost_with_a_pod() -> None:
    lost = "RECEIPTS ARE LOST WITH THEIR POD"
    assert lost in rendered(NEEDED)["NOTES.txt"]
    assert lost not in rendered(NEEDED | {"gateway": {"receipts": {"kind": "hostPath"}}})["NOTES.txt"]
    assert "FOR TRYING OUT ONLY" in rendered(TRIAL)["NOTES.txt"]


def test_alerts_and_dashboards_come_as_they_lie_there_or_not_at_all(tmp_path: Path) -> None:
    values = NEEDED | {"metrics": {"rules": {"enabled": True}, "dashboards": {"enabled": True}}}
    chart = shutil.copytree(CHART, tmp_path / CHART.name, ignore=shutil.ignore_patterns("alerts.yaml", "dashboards"))
    kinds = {(each["kind"], _name(each)) for each in documents(values, chart)}
    assert ("PrometheusRule", NAME) not in kinds and ("ConfigMap", f"{NAME}-dashboards") not in kinds
    alert = {"alert": "Drift", "expr": "x > 0", "annotations": {"summary": "{{ $labels.pod }} drifts"}}
    rules = {"groups": [{"name": "money", "rules": [alert]}]}
    (chart / "files" / "alerts.yaml").write_text(yaml.safe_dump(rules))
    (chart / "files" / "dashboards").mkdir()
    (chart / "files" / "dashboards" / "money.json").write_text('{"title": "{{instance}}"}')
    found = documents(values, chart)
    assert one(found, "PrometheusRule", NAME)["spec"] == rules
    assert one(found, "ConfigMap", f"{NAME}-dashboards")["data"] == {"money.json": '{"title": "{{instance}}"}'}


def test_the_table_of_values_is_fresh() -> None:
    script = runpy.run_path(str(ROOT / ".ci" / "helm_readme.py"))
    readme = (CHART / "README.md").read_text()
    assert script["written"](readme, (CHART / "values.yaml").read_text()) == readme, "run python .ci/helm_readme.py"
    with pytest.raises(SystemExit, match=r"values\.yaml:3: a\.c has no comment"):
        list(script["rows"]("a:\n  # said\n  c: 2\n"))


def test_chart_image_and_package_have_one_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    image = yaml.safe_load((CHART / "values.yaml").read_text())["image"]["tag"]
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert chart["version"] == chart["appVersion"] == image == package


def instructions() -> list[tuple[str, str]]:
    """Of the Containerfile: each with its argument, on one line."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Containerfile").read_text(), flags=re.M).replace("\\\n", " ")
    return [
        (word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())
    ]


def test_the_image_is_pinned_and_small_and_not_root() -> None:
    found = instructions()
    assert found[0][0] == "ARG"
    assert re.fullmatch(r"BASE=[\w./-]+/python:3\.\d+-slim-\w+@sha256:[0-9a-f]{64}", found[0][1])
    stages = [at for at, (word, _) in enumerate(found) if word == "FROM"]
    assert [found[at][1] for at in stages] == ["${BASE} AS build", "${BASE}"]
    final = found[stages[-1] :]
    assert [rest for word, rest in final if word == "USER"] == ["10001:10001"]
    assert "latest" not in str(found) and not [rest for word, rest in found if word == "ADD"]
    runs = " ".join(rest for word, rest in final if word == "RUN")
    assert "rm -rf /usr/local/bin/pip*" in runs and "install" not in runs
    copied = [rest for word, rest in final if word == "COPY"]
    assert copied == ["--from=build /opt/entitlement /opt/entitlement"]


def test_the_image_has_both_processes_and_what_they_may_need() -> None:
    found = instructions()
    sources = {rest.split()[0] for word, rest in found if word == "COPY"}
    assert {"entitlement", "gateway", "ledger_sync"} <= sources
    for name in {word for word, _ in found} - {"ARG"}:
        assert name in {"FROM", "RUN", "COPY", "WORKDIR", "ENV", "USER", "VOLUME", "EXPOSE", "ENTRYPOINT", "CMD"}
    extras = set(re.findall(r"--extra (\w+)", str(found)))
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras == {"envoy", "kafka", "nats", "otel"} and extras <= known.keys()
    assert any("--constraint .ci/requirements.txt" in rest for _, rest in found)
    (user,) = (rest for word, rest in found if word == "USER")
    assert user.split(":")[0] == str(yaml.safe_load((CHART / "values.yaml").read_text())["runAsUser"])


def _name(document: Document) -> str:
    return str(document["metadata"]["name"])
