"""Runs commands in the fork server, and compares what they wrote."""

import contextlib
import json
import os
import re
import signal
import time

from lsg_jax.checkpoint import read_step
from lsg_jax.checkpoint.tree import flatten
from lsg_jax.digest import array_sha256


def without_starts(path):
    """run.json lists the starts of a run, with their times."""
    return {name: value for name, value in json.loads(path.read_text()).items() if name not in ("starts", "self_sha256")}


def losses(path):
    """metrics.jsonl also has the times that steps took."""
    return [(line["step"], line["loss"]) for line in map(json.loads, path.read_text().splitlines())]


def by_question(path):
    """Logs of answers are in the order in which questions were answered, and a kill may cut a line short."""
    found = {}
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        found[entry["id"], entry["question"]] = entry
    return found


SPECIAL = {r"(.*/)?run\.json": without_starts, r"(.*/)?metrics\.jsonl": losses, r"(.*/)?answers/.*\.jsonl": by_question}


def contents(folder):
    """{relative path: content} of a folder; steps of a run by their arrays, since Orbax writes names and times of its own."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if re.fullmatch(r"(.*/)?checkpoints/\d+", name):
            number, arrays, meta = read_step(path.parents[1], int(path.name))
            found[name] = number, {leaf: array_sha256(data) for leaf, data in flatten(arrays).items()}, meta
        elif not re.fullmatch(r"(.*/)?checkpoints/\d+/.*", name):
            special = [read for pattern, read in SPECIAL.items() if re.fullmatch(pattern, name)]
            found[name] = path.is_dir() or (special[0](path) if special else path.read_bytes())
    return found


def differences(found, expected):
    return [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]


class Runner:
    """A command in its folder."""

    def __init__(self, server, inputs, folder, argv):
        self.server, self.inputs, self.folder, self.argv = server, inputs, folder, argv

    def run(self, *, stop_after=None, numbers=(signal.SIGKILL,)):
        """(exit code, stderr, seconds); with `stop_after`, it gets the signals after that many seconds."""
        said = self.folder.with_name(f"{self.folder.name}.err")
        started = time.monotonic()
        pid = self.server.start(self.argv, cwd=self.folder, stdout=os.devnull, stderr=said)
        if stop_after is not None:
            time.sleep(stop_after)
            with contextlib.suppress(ProcessLookupError):
                for number in numbers:
                    os.kill(pid, number)
                    time.sleep(0.02)
        code = self.server.wait()
        text = said.read_text() if said.exists() else ""  # it was killed before it opened it
        return code, text, time.monotonic() - started
