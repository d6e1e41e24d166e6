"""The files that people copy: launch/ and cluster/."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bigtrain.checkpoint.loader import read_tensors
from bigtrain.storage import read_lines

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("launch/quickstart.sh", "launch/torchrun.sh", "launch/slurm.sbatch", "launch/ray_job.sh")
COPIED = (*SCRIPTS[1:], "launch/rayjob.yaml", "cluster/kuberay.yaml", "cluster/aws.yaml", "cluster/gcp.yaml",
          "cluster/Containerfile")  # fmt: skip
RAY_UP = ("aws", "gcp")

ANY: dict[str, Any] = {}
_RESOURCES = {"requests": ANY, "limits": ANY}
_PROBE = {
    "exec": {"command": ANY}, "initialDelaySeconds": ANY, "periodSeconds": ANY, "timeoutSeconds": ANY,
    "failureThreshold": ANY,
}  # fmt: skip
_POD = {
    "automountServiceAccountToken": ANY, "terminationGracePeriodSeconds": ANY, "nodeSelector": ANY,
    "securityContext": {"runAsNonRoot": ANY, "runAsUser": ANY, "fsGroup": ANY},
    "tolerations": [{"key": ANY, "operator": ANY, "effect": ANY}],
    "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
        {"topologyKey": ANY, "labelSelector": {"matchLabels": ANY}},
    ]}},
    "containers": [{
        "name": ANY, "image": ANY, "env": [{"name": ANY, "value": ANY}],
        "ports": [{"containerPort": ANY, "name": ANY}], "resources": _RESOURCES,
        "securityContext": {"allowPrivilegeEscalation": ANY, "capabilities": {"drop": ANY}},
        "readinessProbe": _PROBE, "livenessProbe": _PROBE,
        "volumeMounts": [{"name": ANY, "mountPath": ANY, "readOnly": ANY}],
    }],
    "volumes": [{
        "name": ANY, "emptyDir": {"medium": ANY, "sizeLimit": ANY}, "persistentVolumeClaim": {"claimName": ANY},
        "secret": {"secretName": ANY, "defaultMode": ANY, "optional": ANY}, "configMap": {"name": ANY},
    }],
}  # fmt: skip
_TEMPLATE = {"metadata": ANY, "spec": _POD}
_GROUP = {"rayStartParams": ANY, "template": _TEMPLATE}
_CLUSTER = {
    "rayVersion": ANY, "authOptions": {"mode": ANY},
    "headGroupSpec": {**_GROUP, "serviceType": ANY},
    "workerGroupSpecs": [{**_GROUP, "groupName": ANY, "replicas": ANY, "minReplicas": ANY, "maxReplicas": ANY}],
}  # fmt: skip
# Names and nesting of the fields that the files use, written down from KubeRay's API (ray.io/v1, its Go types) and
# Kubernetes' reference: the published schemas, a megabyte each, come with no Python package.
KINDS = {
    ("ray.io/v1", "RayCluster"): _CLUSTER,
    ("ray.io/v1", "RayJob"): {
        "suspend": ANY, "submissionMode": ANY, "entrypoint": ANY, "backoffLimit": ANY,
        "shutdownAfterJobFinishes": ANY, "ttlSecondsAfterFinished": ANY, "rayClusterSpec": _CLUSTER,
    },
    ("networking.k8s.io/v1", "NetworkPolicy"): {
        "podSelector": {"matchLabels": ANY}, "policyTypes": ANY, "ingress": [{"from": [{"podSelector": ANY}]}],
    },
}  # fmt: skip


def documents(path: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / path).read_text()))


def unknown_fields(value: Any, known: Any, where: str) -> Iterator[str]:
    """Fields of `value` that the shape `known` does not have; ANY is any value."""
    if known == ANY:
        return
    if isinstance(known, list):
        if not isinstance(value, list):
            yield f"{where} is no list"
            return
        for number, item in enumerate(value):
            yield from unknown_fields(item, known[0], f"{where}[{number}]")
        return
    if not isinstance(value, dict):
        yield f"{where} is no mapping"
        return
    for name, item in value.items():
        if name not in known:
            yield f"{where}.{name}"
        else:
            yield from unknown_fields(item, known[name], f"{where}.{name}")


@pytest.mark.parametrize("path", ["cluster/kuberay.yaml", "launch/rayjob.yaml"])
def test_kubernetes_objects_have_fields_that_exist(path: str) -> None:
    for document in documents(path):
        known = KINDS[document["apiVersion"], document["kind"]]
        assert set(document) == {"apiVersion", "kind", "metadata", "spec"}
        assert list(unknown_fields(document["spec"], known, document["kind"])) == []
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", document["metadata"]["name"])
    assert list(unknown_fields({"rayVersoin": 1}, _CLUSTER, "x")) == ["x.rayVersoin"]


def clusters() -> list[dict[str, Any]]:
    return [documents("cluster/kuberay.yaml")[0]["spec"], documents("launch/rayjob.yaml")[0]["spec"]["rayClusterSpec"]]


@pytest.mark.parametrize("number", [0, 1])
def test_a_kubernetes_cluster_is_closed_and_its_pods_have_what_they_name(number: int) -> None:
    cluster = clusters()[number]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["rayVersion"] == pinned()["ray"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        # Readable for the pod's own group alone, as bigtrain demands of secrets.
        assert volumes["keys"]["secret"]["defaultMode"] == 0o440
        assert pod["securityContext"]["runAsNonRoot"]
        assert not pod["automountServiceAccountToken"]
        for container in pod["containers"]:
            assert {"name": "RAY_worker_niceness", "value": "0"} in container["env"]
            assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
            assert container["readinessProbe"]
            assert container["livenessProbe"]
            assert container["resources"]["limits"] == container["resources"]["requests"]
    for worker in cluster["workerGroupSpecs"]:
        assert worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]


def test_the_rayjob_has_the_cluster_of_the_raycluster() -> None:
    def plain(text: str, start: str, indent: int) -> list[str]:
        lines = text[text.index(start) + len(start) :].split("\n---")[0].splitlines()
        return [line[indent:].partition("#")[0].rstrip() for line in lines if line.strip()]

    cluster = plain((ROOT / "cluster/kuberay.yaml").read_text(), "\nspec:\n", 2)
    job = plain((ROOT / "launch/rayjob.yaml").read_text(), "  rayClusterSpec:\n", 4)
    of_this_run = [line for line in job if "name: run," in line]
    assert len(of_this_run) == 2
    different = [pair for pair in zip(cluster, [line for line in job if line not in of_this_run], strict=True)
                 if pair[0] != pair[1]]  # fmt: skip
    assert len(different) == 1, different
    assert "ray.io/cluster" in different[0][0]


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


@pytest.mark.parametrize("cloud", RAY_UP)
def test_ray_accepts_its_cluster_files(cloud: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = documents(f"cluster/{cloud}.yaml")[0]
    validate_config(prepare_config(config))
    types = config["available_node_types"]
    assert sum(kind.get("max_workers", 0) for kind in types.values()) <= config["max_workers"]
    assert "spot" in str(types["gpu"]).lower()
    assert "spot" not in str(types["head"]).lower()
    assert "preemptible" not in str(types["head"])
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head
    for command in (head, worker):
        before = command.partition("ray start")[0]
        assert {"RAY_AUTH_MODE=token", "RAY_worker_niceness=0"} <= set(before.split())
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


@pytest.mark.parametrize("path", COPIED)
def test_a_file_says_what_to_change_and_holds_no_secret(path: str) -> None:
    text = (ROOT / path).read_text()
    assert re.search(r"^# Change: ", text, re.MULTILINE)
    assert not re.search(r"(?i)(key|token|secret|password)['\"]?\s*[:=]\s*['\"]?(?!install-)[A-Za-z0-9+/_-]{20,}", text)
    assert max(map(len, text.splitlines())) <= 130


@pytest.mark.parametrize("folder", ["launch", "cluster"])
def test_the_readmes_name_every_file_and_fit_on_a_screen(folder: str) -> None:
    text = (ROOT / folder / "README.md").read_text()
    for file in (ROOT / folder).iterdir():
        assert file.name == "README.md" or file.suffix == ".dockerignore" or file.name in text, file.name
    assert len(text.splitlines()) <= 40


@pytest.mark.parametrize("path", SCRIPTS)
def test_a_script_is_one(path: str) -> None:
    assert subprocess.run(["bash", "-n", str(ROOT / path)], check=False).returncode == 0
    assert "set -euo pipefail" in (ROOT / path).read_text()


def instructions(path: Path) -> list[tuple[str, str]]:
    """The instructions of a Containerfile, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def test_the_image_installs_what_this_checkout_pins_and_runs_as_no_root() -> None:
    steps = instructions(ROOT / "cluster" / "Containerfile")
    assert {name for name, _ in steps} <= {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "USER", "ENV"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [python] = [value.removeprefix("PYTHON=") for name, value in steps if name == "ARG"]
    assert f"{sys.version_info.major}.{sys.version_info.minor}" == python or python in project["requires-python"]
    copied = [source for name, value in steps if name == "COPY" for source in value.split()[:-1]]
    ignore = (ROOT / "cluster" / "Containerfile.dockerignore").read_text().split()
    for source in copied:
        assert (ROOT / source).exists()
        assert f"!{source.removeprefix('./')}" in ignore
    [pip] = [shlex.split(value) for name, value in steps if name == "RUN" and value.startswith("pip ")]
    assert pip[pip.index("-c") + 1] == "constraints.txt"
    extras = re.fullmatch(r"\.\[(.*)\]", pip[-1])
    assert extras is not None
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"])
    assert [value for name, value in steps if name == "USER"] == ["ray"]
    assert any(name == "ENV" and "RAY_AUTH_MODE=token" in value for name, value in steps)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Runs a script with `torchrun` and `bigtrain` replaced by one that prints its arguments."""
    place = tmp_path / "bin"
    place.mkdir()
    for name in ("torchrun", "bigtrain"):
        (place / name).write_text('#!/bin/sh\nprintf "%s\\n" "$(basename "$0")" "$@"\n')
        (place / name).chmod(0o755)

    def run(script: str, *arguments: str, **variables: str) -> list[str]:
        environment = {"PATH": f"{place}:{os.environ['PATH']}", "HOME": str(tmp_path), **variables}
        done = subprocess.run(
            [str(ROOT / script), *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        return done.stdout.splitlines() if done.returncode == 0 else [done.stderr]

    return run


def test_the_scripts_say_what_is_missing_and_pass_on_the_rest(commands: Callable[..., list[str]]) -> None:
    assert "name a config" in commands("launch/torchrun.sh")[0]
    assert commands("launch/torchrun.sh", "a.yaml", "seed=2", PROCS="3") == [
        "torchrun", "--standalone", "--nproc-per-node", "3", "--max-restarts", "3", "-m", "bigtrain.jobs.torchrun",
        "a.yaml", "seed=2",
    ]  # fmt: skip
    several = commands("launch/torchrun.sh", "a.yaml", NODES="2", NODE_RANK="1", HEAD="node-a:29500")
    assert several[1:9] == [
        "--nnodes", "2", "--node-rank", "1", "--master-addr", "node-a", "--master-port", "29500",
    ]  # fmt: skip
    assert "the dashboard of the cluster" in commands("launch/ray_job.sh", "a.yaml", "run")[0]
    assert commands(
        "launch/ray_job.sh", "a.yaml", "run", "seed=2", BIGTRAIN_ADDRESS="http://h:8265", SECRETS="/k"
    ) == ["bigtrain", "submit", "a.yaml", "seed=2", "--name", "run", "--runs-dir", "/shared/runs", "--secrets-file",
          "/k", "--follow"]  # fmt: skip
    assert commands("launch/slurm.sbatch", "a.yaml", "seed=2", SLURM_JOB_NUM_NODES="4") == [
        "bigtrain", "train", "a.yaml", "seed=2", "job.nodes=4",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_run_under_torchrun_is_the_run_of_train(
    write_config: Callable[..., Path], bigtrain: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    config = write_config(duration="12 steps")
    clean = bigtrain("train", config, "--name", "clean", "--nproc", 2)
    assert clean.returncode == 0, clean.stderr
    environment = os.environ | {"PROCS": "2", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [str(ROOT / "launch" / "torchrun.sh"), str(config)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    run, expected = tmp_path / "runs" / "tiny", tmp_path / "runs" / "clean"
    named = [event["event"] for event in read_lines(run / "events.jsonl")]
    assert [name for name in named if name not in ("saved", "save_waited")] == ["started", "finished"]
    found, wanted = (read_tensors(path / "checkpoints", 12, prefix="") for path in (run, expected))
    assert found.keys() == wanted.keys()
    assert all(found[name].equal(wanted[name]) for name in wanted)
    assert list(read_lines(run / "samples.jsonl")) == list(read_lines(expected / "samples.jsonl"))
    assert "is finished: 12 steps" in bigtrain("train", config).stderr
