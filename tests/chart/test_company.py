"""What a company's values ask for is what comes out: its registry, its issuers and authorities, its pools, its mounts."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from chart.rendering import CASES, NEEDED, Object, Rendered, render, template
from chart.test_settings import gateway_settings, worker_settings
from lacre_fabric.operate import model_routes
from lacre_gateway.settings import AuditKeeping
from parts import strict_yaml

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def company() -> Rendered:
    return render("company")


@pytest.mark.parametrize("case", ["company", "on"])
def test_every_image_comes_from_the_registry(case: str) -> None:
    registry = render(case).values["image"]["registry"]
    images = {container["image"] for container in render(case).containers}
    assert len(images) >= 3
    assert {image for image in images if not image.startswith(f"{registry}/")} == set()


@pytest.mark.parametrize(
    ("registry", "image", "found"),
    [
        ("", "nats:2.12-alpine", "nats:2.12-alpine"),
        ("r.example/", "nats:2.12-alpine", "r.example/nats:2.12-alpine"),
        ("r.example", "library/nats:2.12-alpine", "r.example/library/nats:2.12-alpine"),
        ("r.example", "docker.io/library/nats:2.12", "docker.io/library/nats:2.12"),
        ("r.example", "localhost/nats:2.12", "localhost/nats:2.12"),
        ("r.example", "mirror:5000/nats:2.12", "mirror:5000/nats:2.12"),
    ],
)
def test_the_image_of_nats(registry: str, image: str, found: str) -> None:
    (pod,) = render("defaults", "--set", f"image.registry={registry},nats.image={image}").of_component("nats")
    assert pod.main["image"] == found


def test_each_authority_counts_for_its_own_servers(company: Rendered) -> None:
    settings = gateway_settings(company)
    assert [None if each.ca is None else str(each.ca) for each in settings.issuers] == [None, "/etc/lacre/issuers/corp.pem"]
    assert str(settings.nats.ca) == "/etc/lacre/nats-ca/ca.crt"
    (gateway,) = company.of_component("gateway")
    assert company.file(gateway, "corp.pem").startswith("-----BEGIN CERTIFICATE-----")
    (volume,) = [each["configMap"] for each in gateway.spec["volumes"] if each["name"] == "issuers"]
    assert volume == {"name": gateway.name, "items": [{"key": "corp.pem", "path": "corp.pem"}]}


def test_the_chart_itself_displaces_no_authority(chart: Rendered) -> None:
    """SSL_CERT_FILE would, for every connection of the process."""
    chosen = [each["name"] for pool in chart.values["pools"].values() for each in pool.get("env", ())]
    found = [each["name"] for one in chart.containers for each in one.get("env", ()) if each["name"].startswith("SSL_CERT")]
    assert len(found) == chosen.count("SSL_CERT_FILE")


def test_a_pool_of_an_upstream(company: Rendered) -> None:
    settings = worker_settings(company)["vllm"]
    assert settings.models == ()
    assert settings.upstream is not None
    assert settings.upstream.addresses == ("http://127.0.0.1:8000",)
    assert settings.forwarded == 64
    (pod,) = [pod for pod in company.of_component("worker") if pod.name.endswith("-vllm")]
    assert [container["name"] for container in pod.containers] == ["worker", "vllm"]
    mounts = {each["mountPath"] for each in pod.main["volumeMounts"]}
    assert "/etc/vllm" in mounts
    assert "/models" not in mounts, "an upstream has its own models"
    assert {"vllm-key", "vllm-cache"} <= {each["name"] for each in pod.spec["volumes"]}
    assert {"name": "LACRE_LOG_LEVEL", "value": "info"} in pod.main["env"]


def test_the_manifest_names_the_models_of_an_upstream(company: Rendered) -> None:
    digests = strict_yaml.load_all(company.one("ConfigMap", "r-lacre-signer")["data"]["models.json"])[0]["pools"]
    assert digests["vllm"]["models"]["qwen3-8b"]["context"] == 32768
    assert "gpu" not in digests


def test_placement_and_mounts_are_the_operator_s(company: Rendered) -> None:
    affinity = company.values["gateway"]["affinity"]
    for pod in company.pods:
        assert pod.spec["affinity"] == affinity
    (gateway,) = company.of_component("gateway")
    assert gateway.spec["tolerations"] == company.values["gateway"]["tolerations"]
    assert {"name": "plans", "mountPath": "/etc/corp/plans", "readOnly": True} in gateway.main["volumeMounts"]
    assert [each["name"] for each in gateway.main["env"]] == ["INSTANCE", "HTTPS_PROXY", "NO_PROXY"]


def test_every_part_takes_variables_volumes_and_places(tmp_path: Path) -> None:
    affinity, tolerated = {"nodeAffinity": {}}, {"key": "t", "operator": "Exists"}
    own = "".join(
        f"{part}: {{env: [{{name: A, value: b}}], affinity: {{nodeAffinity: {{}}}}, "
        "nodeSelector: {disk: fast}, tolerations: [{key: t, operator: Exists}], priorityClassName: p, "
        "extraVolumes: [{name: v, emptyDir: {sizeLimit: 1Mi}}], extraVolumeMounts: [{name: v, mountPath: /v}]}\n"
        for part in ("gateway", "workers", "signer", "nats")
    )
    values = tmp_path / "own.yaml"
    values.write_text(own)
    found = Rendered(tuple(strict_yaml.load_all(template(CASES["defaults"], values))), {})
    for pod in found.pods:
        assert pod.spec["affinity"] == affinity
        assert pod.spec["nodeSelector"] == {"disk": "fast"}
        assert pod.spec["tolerations"] == [tolerated]
        assert pod.spec["priorityClassName"] == "p"
        assert {"name": "v", "emptyDir": {"sizeLimit": "1Mi"}} in pod.spec["volumes"]
        for container in pod.containers:
            assert {"name": "A", "value": "b"} in container["env"]
            assert {"name": "v", "mountPath": "/v"} in container["volumeMounts"]


def test_the_cases_of_rules_lie_in_their_folders(company: Rendered) -> None:
    (gateway,) = company.of_component("gateway")
    (volume,) = [each["projected"] for each in gateway.spec["volumes"] if each["name"] == "policies"]
    whole, cases = (source["configMap"] for source in volume["sources"])
    assert whole == {"name": "corp-rules"}
    assert [item["path"] for item in cases["items"]] == [
        "cases/ALLOW/engineers-chat.json", "cases/DENY/guests-chat.json", "cases/DENY/large-model-at-night.json",
    ]  # fmt: skip
    said = [each["projected"] for each in render("on").of_component("gateway")[0].spec["volumes"] if "projected" in each]
    assert said[0]["sources"][1]["configMap"]["items"] == [{"key": "no-cases", "path": "no-cases"}]


def test_alerts_of_budgets_are_signed_and_sent(company: Rendered) -> None:
    alerts = gateway_settings(company).alerts
    assert alerts is not None
    assert (alerts.url, str(alerts.ca)) == ("https://hooks.corp.example:8444/lacre", "/etc/lacre/issuers/corp.pem")
    assert alerts.limits == ("tokens_per_day",)
    (gateway,) = company.of_component("gateway")
    (mount,) = [each for each in gateway.main["volumeMounts"] if alerts.secret.is_relative_to(each["mountPath"])]
    (volume,) = [each["secret"] for each in gateway.spec["volumes"] if each["name"] == mount["name"]]
    items = [{"key": "secret", "path": alerts.secret.name}]
    assert volume == {"secretName": "corp-webhook", "defaultMode": 0o400, "items": items}, (
        "the gateway takes a private file alone"
    )


def test_audit_logs_are_rotated_and_kept(company: Rendered) -> None:
    assert gateway_settings(company).audit_logs == AuditKeeping(rotate_days=30, rotate_entries=10_000_000, keep_days=730)
    assert gateway_settings(render("defaults")).audit_logs == AuditKeeping()


def test_the_signer_publishes_the_routes(company: Rendered, tmp_path: Path) -> None:
    """As `lacre manifest publish` reads them, against the pools of the same values."""
    data = company.one("ConfigMap", "r-lacre-signer")["data"]
    (tmp_path / "routes.toml").write_text(data["routes.toml"])
    found = model_routes.read(tmp_path / "routes.toml", json.loads(data["site.json"])["pools"])
    ways = {name: [(each.pool, each.model, each.share) for each in route.targets] for name, route in found.items()}
    assert ways == {
        "assistant": [("gpu", "large", 95), ("vllm", "qwen3-8b", 5)],
        "mixtral": [("elsewhere", "mixtral", 0), ("gpu", "large", 0)],
    }
    assert [found[name].sticky for name in ("assistant", "mixtral")] == [True, False]
    for pod in company.of_component("signer"):
        (publish,) = [each for each in pod.containers if each["name"] == "publish"]
        file = publish["command"][publish["command"].index("--routes") + 1]
        assert {"name": "settings", "mountPath": file, "subPath": "routes.toml", "readOnly": True} in publish["volumeMounts"]
    for pod in render("defaults").of_component("signer"):
        assert all("--routes" not in each["command"] for each in pod.containers), "the state's own routes stay"


@pytest.mark.parametrize(
    "said", [{}, {'a"b<c\\': {"pools": [{"pool": "default", "model": "smollm2-135m", "share": 10**6}]}}], ids=["none", "odd"]
)
def test_routes_are_removed_and_have_odd_names(tmp_path: Path, said: Object) -> None:
    (values := tmp_path / "routes.yaml").write_text(json.dumps({"routes": said}))
    made = render("defaults", "--values", str(values))
    data = made.one("ConfigMap", "r-lacre-signer")["data"]
    (tmp_path / "routes.toml").write_text(data["routes.toml"])
    found = model_routes.read(tmp_path / "routes.toml", json.loads(data["site.json"])["pools"])
    assert {name: [target.members() for target in route.targets] for name, route in found.items()} == {
        name: route["pools"] for name, route in said.items()
    }
    assert all("--routes" in pod.containers[1]["command"] for pod in made.of_component("signer"))


def test_no_pool_is_made_that_was_not_named(case: str) -> None:
    chart = render(case)
    assert {pod.labels["lacre/pool"] for pod in chart.of_component("worker")} == chart.values["pools"].keys()
    assert "default" in chart.values["pools"] or case in ("company", "two-pools")


def test_without_any_pool_nothing_is_rendered() -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        template()
    assert re.search(r"pools: name at least one, such as pools: \{default: \{\}\}", refused.value.stderr)
    assert "pools" not in NEEDED.read_text()
