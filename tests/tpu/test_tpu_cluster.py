"""The image and the GKE manifests of tpu/: hadolint, a strict schema of JobSet, and what follows each exit code of lsg."""

import copy
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from lsg_jax import errors

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((Path(__file__).parent / "jobset.schema.json").read_text(encoding="utf-8"))


@pytest.fixture
def jobset():
    return yaml.safe_load((ROOT / "tpu/jobset.yaml").read_text(encoding="utf-8"))


def job_of(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def test_hadolint():
    binary = shutil.which("hadolint") or str(Path(sys.executable).parent / "hadolint")
    subprocess.run([binary, ROOT / "tpu/Dockerfile"], check=True)


def test_the_image_has_all_it_copies_and_lsg_gets_signals():
    lines = (ROOT / "tpu/Dockerfile").read_text(encoding="utf-8").splitlines()
    ignored = (ROOT / "tpu/Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert ignored[ignored.index("*") + 1 :][: len(copied)] == [f"!{name}" for name in copied]  # not ignored after all
    assert all((ROOT / name).exists() for name in copied) and "pyproject.toml" in copied
    assert 'ENTRYPOINT ["lsg"]' in lines  # exec form: no shell in between
    user = next(line.split()[1] for line in lines if line.startswith("USER "))
    assert f"useradd --uid {user} " in "\n".join(lines) and user != "0"


def test_jobset_keeps_to_the_schema(jobset):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(jobset, SCHEMA)


@pytest.mark.parametrize(
    "path, value",
    [
        (["apiVersion"], "jobset.x-k8s.io/v1alpha1"),
        (["spec", "sucessPolicy"], {}),
        (["spec", "failurePolicy", "maxRestarts"], "10"),
        (["spec", "failurePolicy", "rules", 0, "action"], "FailJob"),
        (["spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "restartPolicy"], "OnFailure"),
        (["spec", "replicatedJobs", 0, "template", "spec", "podFailurePolicy", "rules", 0, "onExitCodes", "values"], [0]),
        (
            ["spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "resources", "limits"],
            {"a": 4},
        ),
        (["spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "terminationGracePeriod"], 15),
    ],
)
def test_the_schema_is_strict(jobset, path, value):
    wrong = copy.deepcopy(jobset)
    *above, last = path
    place = wrong
    for key in above:
        place = place[key]
    place[last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, SCHEMA)


def what_happens(jobset, code):
    """What Kubernetes and JobSet do with a pod that ends with this code."""
    job = job_of(jobset)
    reason = "BackoffLimitExceeded"
    for rule in job["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        if codes and (code in codes["values"]) == (codes["operator"] == "In"):
            if rule["action"] == "Ignore":
                return "pod again"
            reason = "PodFailurePolicy"
            break
    assert job["backoffLimit"] == 0
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        if reason in rule["onJobFailureReasons"]:
            return rule["action"]
    return "all again" if jobset["spec"]["failurePolicy"]["maxRestarts"] else "failed"


def test_exit_codes(jobset):
    final = {2, errors.InputError.exit_code, errors.ConfigError.exit_code, errors.NonFiniteError.exit_code}
    for code in range(1, 256):
        wanted = "FailJobSet" if code in final else "pod again" if code == errors.Preempted.exit_code else "all again"
        assert what_happens(jobset, code) == wanted, code
    names = [
        rule["onExitCodes"]["containerName"] for rule in job_of(jobset)["podFailurePolicy"]["rules"] if "onExitCodes" in rule
    ]
    containers = job_of(jobset)["template"]["spec"]["containers"]
    assert set(names) == {container["name"] for container in containers}


def test_pods_fill_the_slice(jobset):
    job = job_of(jobset)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = int(container["resources"]["limits"]["google.com/tpu"])
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert job["parallelism"] == job["completions"] == math.prod(map(int, topology.split("x"))) // chips
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert job["completionMode"] == "Indexed"


def test_lsg_is_process_1_and_its_output_is_shared(jobset):
    pod = job_of(jobset)["template"]["spec"]
    (container,) = pod["containers"]
    (script,) = container["args"]
    words = script.split()
    assert container["command"] == ["bash", "-c"] and words[:3] == ["exec", "lsg", "train"] and "--multihost" in words
    assert (ROOT / words[3]).exists()
    (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
    assert mount["name"] == volume["name"]
    output = next(word.removeprefix("output=") for word in words if word.startswith("output="))
    assert output.startswith(mount["mountPath"] + "/")
    claim = yaml.safe_load((ROOT / "tpu/storage.yaml").read_text(encoding="utf-8"))
    assert claim["kind"] == "PersistentVolumeClaim" and claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claim["metadata"]["name"] == volume["persistentVolumeClaim"]["claimName"]
