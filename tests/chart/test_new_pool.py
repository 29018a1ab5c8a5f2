"""`lacre pool add --offline` prints commands for a cluster: they make the Secrets that the new pods mount, in order."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from chart.preparing import ARCHIVED, lacre
from chart.rendering import CHART, NEEDED, Object, Rendered, helm

pytestmark = pytest.mark.slow


@dataclass
class Cluster:
    """What the printed commands would do to one.

    secrets: their entries' files. done: every step, in its order. archived: the files in the signer's archive. mode: its own.
    """

    secrets: dict[str, dict[str, Path]]
    done: list[str]
    archived: list[str] = field(default_factory=list)
    mode: int = 0

    @classmethod
    def after(cls, printed: str) -> Cluster:
        cluster = cls({}, [])
        for line in printed.splitlines():
            words = shlex.split(line.partition(" | ")[0], comments=True)
            if "tar -cf" in line or words[:1] == ["rm"]:
                subprocess.run(["sh", "-c", f"umask 022; {line}"], check=True)
                cluster.done.append("rm" if words[0] == "rm" else "tar")
            elif words[3:6] == ["create", "secret", "generic"]:
                cluster.secrets[words[6]] = cluster._entries(words[7:])
                cluster._look(cluster.secrets[words[6]].get("state.tar"))
                cluster.done.append(words[6])
            elif words[:1] in (["kubectl"], ["helm"]):
                cluster.done.append(" ".join(word for word in words if word not in ("-n", "lacre")))
        return cluster

    def _look(self, archive: Path | None) -> None:
        if archive is not None:
            with tarfile.open(archive) as opened:
                self.archived = [each.name for each in opened if each.isfile()]
            self.mode = archive.stat().st_mode & 0o777

    @staticmethod
    def _entries(options: list[str]) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for option in options:
            name, _, value = option.removeprefix("--from-file=").rpartition("=")
            if option.startswith("--from-file="):
                path = Path(value)
                found |= {one.name: one for one in path.iterdir()} if path.is_dir() else {name: path}
        return found


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """As docs/kubernetes.md makes it."""
    folder = tmp_path / "site"
    folder.mkdir()
    members = {"pools": {"default": ["smollm2-135m"]}, "replicas": 3, "nats": "tls://lacre-nats.lacre.svc:4222"}
    (folder / "site.json").write_text(json.dumps({**members, "gateway": "https://lacre.example.com"}))
    lacre("keys", "init", "--state", str(folder), "--pool", "default")
    return folder


def rendered(site: Path, own: Object) -> Rendered:
    mine = site.parent / "mine.yaml"
    mine.write_text(yaml.safe_dump(own))
    values = [part for path in (NEEDED, site / "chart" / "pools.yaml", mine) for part in ("-f", str(path))]
    done = subprocess.run(
        [helm(), "template", "lacre", str(CHART), "-n", "lacre", *values], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return Rendered(tuple(filter(None, yaml.safe_load_all(done.stdout))), {})


def worker(chart: Rendered, pool: str) -> tuple[set[str], set[str]]:
    """The Secrets that its pod mounts, and the files of them that its settings name."""
    (pod,) = [each for each in chart.pods if each.name == f"lacre-worker-{pool}"]
    named = set(re.findall(r'"/etc/lacre/secret/([^"]+)"', chart.file(pod, "worker.toml")))
    return {volume["secret"]["secretName"] for volume in pod.spec["volumes"] if "secret" in volume}, named


def test_the_printed_commands_fit_the_chart(site: Path) -> None:
    add = ("pool", "add", "--offline", "--state", str(site))
    (site / "state.tar").touch(0o644)  # as earlier versions left it
    legal = Cluster.after(lacre(*add, "legal", "--model", "large"))
    vllm = Cluster.after(lacre(*add, "vllm", "--model", "qwen", "--upstream", "http://127.0.0.1:8000"))
    assert legal.done == [
        "lacre-nats",
        "kubectl rollout restart statefulset/lacre-nats",
        "kubectl rollout status statefulset/lacre-nats --timeout=15m",
        "lacre-pool-legal",
        "lacre-pool-legal-keys",
        "tar",
        "lacre-signer",
        "rm",
        f"helm upgrade deploy/helm/lacre -f {site}/chart/pools.yaml -f mine.yaml --wait",
    ]
    assert {path.name for path in legal.secrets["lacre-pool-legal-keys"].values()} == {"1.key", "2.key"}
    chart = rendered(site, {"pools": {"default": {"replicas": 3}}})
    assert "lacre-nats" in chart.names("StatefulSet")
    signer = json.loads(chart.one("ConfigMap", "lacre-signer")["data"]["site.json"])
    assert signer["pools"] == {"default": ["smollm2-135m"], "legal": ["large"], "vllm": ["qwen"]}
    for pool, cluster in (("legal", legal), ("vllm", vllm)):
        mounted, named = worker(chart, pool)
        assert {f"lacre-pool-{pool}", f"lacre-pool-{pool}-keys"} <= mounted
        assert cluster.secrets[f"lacre-pool-{pool}"].keys() == named
        assert all(path.exists() for entries in cluster.secrets.values() for path in entries.values() if path.suffix != ".tar")
        assert cluster.mode == 0o600
    assert {name.split("/")[0] for name in vllm.archived} == {name.split("/")[0] for name in ARCHIVED}
    assert "pools/vllm/receipt.pem" in vllm.archived
    assert "root.pem" not in vllm.archived
    assert not (site / "state.tar").exists()


def test_the_way_back(site: Path) -> None:
    lacre("pool", "add", "legal", "--model", "large", "--offline", "--state", str(site))
    gone = Cluster.after(lacre("pool", "remove", "legal", "--yes", "--offline", "--state", str(site)))
    assert [step.split()[0] + step.split()[-1] for step in (gone.done[3], gone.done[-1])] == [
        "helm--wait",
        "kubectl--ignore-not-found",
    ]
    assert gone.done[:3] == ["tar", "lacre-signer", "rm"]
    assert "pools/default/receipt.pem" in gone.archived
    assert not {"pools/legal/receipt.pem", "pools/legal/keys/1.key"} & set(gone.archived)
    assert gone.done[4:-1] == [
        "lacre-nats",
        "kubectl rollout restart statefulset/lacre-nats",
        "kubectl rollout status statefulset/lacre-nats --timeout=15m",
    ]
    assert "legal" not in gone.secrets["lacre-nats"]["accounts.json"].read_text()
    assert set(json.loads((site / "chart" / "pools.yaml").read_text())["pools"]) == {"default"}


@pytest.mark.parametrize("name", ["a" * 21, "my_pool", "pool-"])
def test_a_name_that_the_chart_cannot_have(site: Path, name: str) -> None:
    with pytest.raises(AssertionError, match="cannot be a pool in the Helm chart"):
        lacre("pool", "add", name, "--model", "large", "--offline", "--state", str(site))
    assert not (site / "pools" / name).exists()
