"""The scripts of tpu/ with a fake gcloud that records its calls (fake_gcloud.py), and under shellcheck."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lsg_jax.checkpoint.lock import FolderLock
from lsg_jax.errors import BusyError

TPU = Path(__file__).parents[2] / "tpu"
OPTIONS = ["--zone", "us-west4-a", "--project", "p", "--poll-seconds", "0"]
TRAIN = ["--", "train", "configs/my run.toml", "--set", "output=/mnt/lsg/it's here"]
ACTIVE = {"states": ["ACTIVE"]}


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A small git checkout with the scripts, so that the packed archive does not depend on this one."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(TPU, root / "tpu")
    (root / "configs").mkdir()
    (root / "configs/tiny.toml").touch()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run(git + command, cwd=root, check=True)
    return root


class Cloud:
    """The folder of the fake gcloud, and how scripts run with it."""

    def __init__(self, folder, checkout):
        self.folder, self.checkout = folder, checkout
        (folder / "bin").mkdir()
        self.program("gcloud", f'exec {sys.executable} -S {Path(__file__).parent / "fake_gcloud.py"} "$@"')
        self.program("ssh-add", "echo 256 SHA256:key")  # from here on, of the hosts
        self.program("timedatectl", "echo yes")
        self.program("df", "echo 20000000")
        self.program("mount.nfs", "")
        self.program("mountpoint", f"[ -e {folder}/mounted ]")
        self.program("sudo", f'echo "$@" >>{folder}/sudo; [ "$1" != mount ] || touch {folder}/mounted')
        kept = {name: value for name, value in os.environ.items() if not name.startswith("LSG_TPU_")}
        own = {"PATH": f"{folder / 'bin'}:{kept['PATH']}", "FAKE_GCLOUD": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
        self.environment = kept | own
        self.play(ACTIVE)

    def program(self, name, text):
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def play(self, *lives):
        for name in ("calls.jsonl", "now.json", "in_ssh"):
            (self.folder / name).unlink(missing_ok=True)
        (self.folder / "play.json").write_text(json.dumps(lives))

    def start(self, script, *arguments):
        return subprocess.Popen(
            [self.checkout / "tpu" / script, *OPTIONS, *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # the shell of a CI may ignore it
        )

    def run(self, script, *arguments):
        """(exit code, stdout, stderr)"""
        process = self.start(script, *arguments)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def calls(self, *words):
        """The recorded calls that contain all the words; a call that repeats the one before (polling) is left out."""
        path = self.folder / "calls.jsonl"
        calls = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        calls = [call for i, call in enumerate(calls) if i == 0 or call != calls[i - 1]]
        return [call for call in calls if all(word in call for word in words)]

    def verbs(self):
        """The recorded actions in order, without queries of states."""
        names = [call[3] for call in self.calls() if call[:2] == ["compute", "tpus"]]
        return [name for name in names if name not in ("describe", "scp")]

    def host(self, number, name):
        path = self.folder / "hosts" / str(number) / name
        return path.read_text() if path.exists() else ""


@pytest.fixture
def cloud(tmp_path, checkout):
    yield Cloud(tmp_path, checkout)
    for path in tmp_path.glob("hosts/*/lsg_runs/*/child"):  # left by a failed test
        if not (path.parent / "exit").exists():
            os.kill(int(path.read_text()), signal.SIGKILL)


def binary(name):
    return shutil.which(name) or str(Path(sys.executable).parent / name)


def test_shellcheck():
    subprocess.run([binary("shellcheck"), "-x", *sorted(TPU.glob("*.sh"))], cwd=TPU, check=True)


@pytest.mark.parametrize("script", ["create.sh", "run.sh", "resume.sh", "doctor.sh", "delete.sh"])
def test_help_and_usage(cloud, script):
    code, out, _ = cloud.run(script, "--help")
    assert code == 0 and f"tpu/{script} --zone ZONE" in out and "--dry-run" in out
    for wrong in (["--nonsense"], ["--accelerator-type", "v3-8"], ["--name"], ["--zone="], ["--poll-seconds", "soon"]):
        code, _, err = cloud.run(script, *wrong, *TRAIN)
        assert (code, err.count("\n")) == (2, 1), err
    assert not cloud.calls()


@pytest.mark.parametrize(
    "kind, version",
    [
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_create_waits_until_active(cloud, kind, version):
    cloud.play({"states": ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]})
    code, _, err = cloud.run("create.sh", f"--accelerator-type={kind}", "--spot", "--", "--network=n")
    assert code == 0 and "billed" in err
    (call,) = cloud.calls("create")
    assert {f"--accelerator-type={kind}", f"--runtime-version={version}", "--spot", "--node-id=lsg", "--network=n"} <= set(call)
    assert cloud.run("create.sh")[0] == 0 and len(cloud.calls("create")) == 1  # it is there


def test_create_says_what_went_wrong(cloud):
    for lives, text in (
        ([], "refused"),
        ([{"states": ["CREATING", "FAILED"]}], "FAILED"),
        ([{"states": ["SUSPENDED"]}], "SUSPENDED"),
    ):
        cloud.play(*lives)
        code, _, err = cloud.run("create.sh")
        assert code == 1 and text in err


DRY = {
    "create.sh": ["--spot"],
    "run.sh": ["--id", "a", "--unlock", "/o=h", *TRAIN],
    "delete.sh": ["--yes"],
    "doctor.sh": [],
    "resume.sh": ["--id", "a", "--output", "/o", *TRAIN],
}


@pytest.mark.parametrize("script", DRY)
def test_dry_run_prints_what_a_real_run_calls(cloud, script):
    lives = [ACTIVE | {"lsg": [[75], [75]]}, ACTIVE] if script == "resume.sh" else [ACTIVE]
    cloud.play(*lives)
    if script in ("run.sh", "delete.sh", "doctor.sh"):
        cloud.run("create.sh")
        (cloud.folder / "calls.jsonl").unlink()
    code, out, _ = cloud.run(script, "--dry-run", *DRY[script])
    assert code == 0 and not cloud.calls()
    printed = [shlex.split(line)[1:] for line in out.splitlines() if line.startswith("gcloud ")]
    name = subprocess.run(["hostname"], capture_output=True, text=True, check=True).stdout.strip()
    cloud.run(script, *DRY[script])
    recorded = [[word.replace(f"unlock /o {name}", "unlock /o HOST") for word in call] for call in cloud.calls()]
    if script == "resume.sh":  # queries of the state depend on the course of the run
        printed, recorded = ([call for call in calls if "describe" not in call] for calls in (printed, recorded))
    assert printed == recorded and printed


def test_run_installs_once_and_hands_arguments_on(cloud):
    cloud.run("create.sh")
    code, out, err = cloud.run("run.sh", "--id", "a", *TRAIN)
    assert code == 0 and out.count("lsg says train") == 2, out + err
    for number in (0, 1):
        assert cloud.host(number, "lsg_calls") == "train configs/my run.toml --set output=/mnt/lsg/it's here --multihost\n"
        assert cloud.host(number, "lsg_jax/configs/tiny.toml") == "" and cloud.host(number, "lsg_venv/installed")
    assert cloud.run("run.sh", "--id", "a", *TRAIN)[0] == 0  # the same run: shown, not started again
    assert len(cloud.host(0, "lsg_calls").splitlines()) == 1
    cloud.run("run.sh", "--id", "b", "--", "eval", "c.toml", "--multihost")
    assert cloud.host(1, "lsg_calls").splitlines()[1] == "eval c.toml --multihost"


@pytest.mark.parametrize(
    "codes, expected", [((0, 0), 0), ((1, 65), 65), ((75, 75), 75), ((134, 75), 75), ((0, 3), 3), ((75, 70), 70), ((2, 2), 2)]
)
def test_exit_code_of_the_host_that_knows(cloud, codes, expected):
    cloud.play(ACTIVE | {"lsg": [[code] for code in codes]})
    cloud.run("create.sh")
    assert cloud.run("run.sh", *TRAIN)[0] == expected


def test_resume_survives_preemptions(cloud):
    cloud.play(
        {"states": ["WAITING_FOR_RESOURCES", "ACTIVE"], "lsg": [[75], [75]], "after": "SUSPENDING"},  # saved in time
        {"states": ["PROVISIONING", "SUSPENDED"]},  # preempted before it was active
        ACTIVE | {"lsg": [[134], [255]], "after": "SUSPENDED"},  # died
        ACTIVE | {"lsg": [[1], [255]], "node": "PREEMPTED"},  # died, and the state of the queued resource lags
        ACTIVE | {"lsg": [[75], [75]]},  # stopped and saved
        ACTIVE,
    )
    state = cloud.folder / "now.json"
    process = cloud.start("resume.sh", "--spot", *TRAIN)
    while process.poll() is None:  # a slice that is being suspended is gone some time later
        if state.exists() and '"SUSPENDING"' in (text := state.read_text()):
            state.write_text(text.replace("SUSPENDING", "SUSPENDED"))
        time.sleep(0.02)
    _, err = process.communicate()
    assert process.returncode == 0, err
    verbs = [verb for verb in cloud.verbs() if verb != "ssh"]
    assert verbs == ["create", "delete"] * 5 + ["create"]
    assert "billed until tpu/delete.sh" in err


@pytest.mark.parametrize("code, options", [(0, []), (2, []), (65, ["--delete-at-end"]), (70, [])])
def test_resume_ends_at_once(cloud, code, options):
    cloud.play(ACTIVE | {"lsg": [[code], [code]]})
    assert cloud.run("resume.sh", *options, *TRAIN)[0] == code
    assert cloud.verbs() == ["create", "ssh", "ssh", *["delete" for _ in options]]


def test_resume_gives_up(cloud):
    cloud.play(ACTIVE | {"lsg": [[1], [1]]})
    code, _, err = cloud.run("resume.sh", "--max-failures", "2", *TRAIN)
    assert code == 1 and "2 times in a row" in err and "billed" in err
    assert cloud.host(0, "lsg_calls").count("\n") == 2 and not cloud.calls("delete")
    cloud.play(ACTIVE | {"lsg": [[1, 1, 0], [1, 1, 0]]})  # late failures do not end it
    assert cloud.run("resume.sh", "--max-failures", "2", "--soon", "0", *TRAIN)[0] == 0
    cloud.play(*[{"states": ["FAILED"]}] * 5)
    assert cloud.run("resume.sh", "--max-failures", "2", *TRAIN)[0] == 1
    assert len(cloud.calls("create")) == 2


def test_ctrl_c_deletes_nothing_and_resume_goes_on_with_the_same_run(cloud):
    cloud.play(ACTIVE | {"lsg": [["wait"], ["wait"]]})
    process = cloud.start("resume.sh", *TRAIN)
    while len(list(cloud.folder.glob("hosts/*/lsg_runs/*/pid"))) + len(list(cloud.folder.glob("hosts/*/lsg_calls"))) < 4:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "lsg goes on" in err and "is not deleted" in err and "billed" in err
    assert not cloud.calls("delete")
    assert cloud.run("run.sh", "--", "eval", "c.toml")[0] == 1  # another run is active: not mixed up with it
    process = cloud.start("run.sh", "--id", "other", *TRAIN)
    while cloud.verbs().count("ssh") < 6:
        assert process.poll() is None
        time.sleep(0.02)
    assert cloud.run("run.sh", "--stop")[0] == 0
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "lsg says train" in out
    assert cloud.host(0, "lsg_calls").count("\n") == 1


def test_delete(cloud):
    assert cloud.run("delete.sh", "--yes")[0] == 0 and not cloud.calls("delete")  # there is none
    cloud.run("create.sh")
    code, _, err = cloud.run("delete.sh")  # no terminal to ask on
    assert code == 2 and "--yes" in err and not cloud.calls("delete")
    assert cloud.run("delete.sh", "--yes")[0] == 0
    assert "--force" in cloud.calls("delete")[0]


def test_mount(cloud, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    cloud.run("create.sh")
    assert cloud.run("run.sh", "--mount", f"10.0.0.2:/lsg:{shared}", *TRAIN)[0] == 0
    done = (cloud.folder / "sudo").read_text().splitlines()
    assert f"mount -t nfs 10.0.0.2:/lsg {shared}" in done
    assert cloud.run("run.sh", "--mount", f"10.0.0.2:/lsg:{shared}", *TRAIN)[0] == 0
    assert (cloud.folder / "sudo").read_text().splitlines() == done
    code, _, err = cloud.run("run.sh", "--mount", "10.0.0.2:/lsg:/nowhere", *TRAIN)
    assert code == 1 and "/nowhere is mounted but cannot be written" in err


def test_doctor(cloud):
    code, out, _ = cloud.run("doctor.sh")
    assert code == 1 and "ok    account" in out and "FAIL  slice: there is no lsg: run tpu/create.sh" in out
    cloud.run("create.sh")
    code, out, _ = cloud.run("doctor.sh")
    assert code == 1 and out.count("lsg_jax is not installed: run tpu/run.sh") == 2
    cloud.run("run.sh", *TRAIN)

    def devices(host, count):
        python = cloud.folder / "hosts" / str(host) / "lsg_venv/bin/python"
        python.write_text(f'#!/bin/sh\ncase "$2" in *device_count*) case "$2" in *"== {count}") ;; *) exit 1;; esac;; esac\n')
        python.chmod(0o755)

    devices(0, 16)
    devices(1, 16)
    code, out, _ = cloud.run("doctor.sh")
    assert code == 0, out
    assert "FAIL" not in out and out.count("JAX sees 16 devices\n") == 2
    devices(1, 8)
    cloud.program("timedatectl", "echo no")
    cloud.program("df", "echo 2000000")
    cloud.program("ssh-add", "exit 1")
    code, out, _ = cloud.run("doctor.sh")
    assert code == 1 and out.count("FAIL") == 6
    for failed in ("ssh key: ", "clock: ", "10 GB free on /: ", "JAX sees 16 devices: "):
        assert re.search(f"FAIL .*{failed}.+", out)


def test_unlock_is_for_the_lost_host_only(tmp_path):
    """The lock that lsg itself writes, left by a process of another machine."""
    write = "import socket, os; socket.gethostname = lambda: 'lost-w-0'; from lsg_jax.checkpoint.lock import FolderLock;"
    code = write + f"FolderLock({str(tmp_path)!r}).acquire(); os._exit(0)"
    subprocess.run([sys.executable, "-c", code], check=True)
    for host, goes in (("other-w-0", False), ("lost-w-0", True)):
        subprocess.run(["bash", TPU / "on_host.sh", "unlock", tmp_path, host], check=True)
        if not goes:
            with pytest.raises(BusyError, match="lost-w-0"):
                FolderLock(tmp_path).acquire()
    with FolderLock(tmp_path) as lock:
        assert lock.held
