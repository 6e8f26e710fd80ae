"""A fake `gcloud` that records its calls and simulates the states of a slice. Hosts are home folders on this machine.

Run with FAKE_GCLOUD naming a folder with `play.json`: a list of lives, one for each time that the slice is created,

    {"states": [state at each look, the last one stays], "lsg": [[exit codes of lsg on host 0, the last one stays], ...],
     "after": state once lsg has ended}

A code "wait" makes lsg wait for SIGTERM and end with 75. The folder gets `calls.jsonl`, `now.json` and `hosts/0`, `hosts/1`.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(os.environ["FAKE_GCLOUD"])
KNOWN = [["queued-resources", verb] for verb in ("create", "delete", "describe")]
KNOWN += [["tpu-vm", verb] for verb in ("describe", "scp", "ssh")]
UV = """#!/usr/bin/env bash
# installs a fake lsg where `uv pip install` would put the real one
[[ $1 == pip ]] || exit 0
mkdir -p "$HOME/lsg_venv/bin"
cp "$HOME/fake_lsg" "$HOME/lsg_venv/bin/lsg"
"""
LSG = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$HOME/lsg_calls"
code=$(head -n 1 "$HOME/codes")
if (($(wc -l <"$HOME/codes") > 1)); then sed -i 1d "$HOME/codes"; fi
echo "lsg says $*"
if [[ $code == wait ]]; then
  trap 'exit 75' TERM
  while true; do sleep 0.05; done
fi
exit "$code"
"""


def main(arguments: list[str]) -> int:
    with open(HERE / "calls.jsonl", "a", encoding="utf-8") as calls:
        calls.write(json.dumps(arguments) + "\n")
    now = (
        json.loads((HERE / "now.json").read_text()) if (HERE / "now.json").exists() else {"life": -1, "state": None, "looks": 0}
    )
    code = play(arguments, now, json.loads((HERE / "play.json").read_text()))
    (HERE / "now.json").write_text(json.dumps(now))
    return code


def play(arguments: list[str], now: dict, lives: list[dict]) -> int:
    what = [word for word in arguments if not word.startswith("-")]
    if what[2:4] not in KNOWN:  # everything that doctor checks exists
        print(what[-1])
        return 0
    if what[2:4] == ["queued-resources", "create"]:
        now |= {"life": now["life"] + 1, "state": None, "looks": 0}
        if now["life"] >= len(lives):
            print("ERROR: (gcloud) RESOURCE_EXHAUSTED", file=sys.stderr)
            return 1
        make_hosts(lives[now["life"]])
        return 0
    life = lives[now["life"]] if 0 <= now["life"] < len(lives) and now["state"] != "deleted" else None
    if what[2:4] == ["queued-resources", "delete"]:
        now["state"] = "deleted"
        return 0
    if what[2:4] == ["queued-resources", "describe"]:
        if life is None:
            print("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: was not found", file=sys.stderr)
            return 1
        print(now["state"] or life["states"][min(now["looks"], len(life["states"]) - 1)])
        now["looks"] += 1
        return 0
    if what[3] == "describe":
        print(life.get("node", "READY") if life else "")
        return 0
    worker = next(word.removeprefix("--worker=") for word in arguments if word.startswith("--worker="))
    hosts = sorted((HERE / "hosts").iterdir()) if worker == "all" else [HERE / "hosts" / worker]
    if what[3] == "scp":
        for host in hosts:
            shutil.copy(what[4], host / what[5].partition(":")[2])
        return 0
    command = next(word.removeprefix("--command=") for word in arguments if word.startswith("--command="))
    code = run_on(hosts, command)
    if " run " in command and life and "after" in life:
        now["state"] = life["after"]
    return code


def make_hosts(life: dict) -> None:
    shutil.rmtree(HERE / "hosts", ignore_errors=True)
    for number, codes in enumerate(life.get("lsg", [[0], [0]])):
        home = HERE / "hosts" / str(number)
        (home / ".local/bin").mkdir(parents=True)
        (home / ".local/bin/uv").write_text(UV)
        (home / "fake_lsg").write_text(LSG)
        for path in (home / ".local/bin/uv", home / "fake_lsg"):
            path.chmod(0o755)
        (home / "codes").write_text("".join(f"{code}\n" for code in codes))


def run_on(hosts: list[Path], command: str) -> int:
    """Runs on all hosts at once, as ssh would; returns the exit code of the first host that failed, as gcloud does."""
    processes = [subprocess.Popen(["bash", "-c", command], cwd=host, env=os.environ | {"HOME": str(host)}) for host in hosts]
    (HERE / "in_ssh").touch()
    codes = [process.wait() for process in processes]
    if len(codes) > 1:
        for worker, code in enumerate(codes):
            if code:
                print(
                    f"##### Command execution on worker {worker} failed with exit status {code}. Continuing.", file=sys.stderr
                )
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
