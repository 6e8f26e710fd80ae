"""Starts `lsg` commands by fork from a process that has imported everything large, since imports are most of a tiny command.

No JAX backend, no thread and no file of ours exists before the fork, so a command does what a fresh process does, but for its
first second, in which it would import. The protocol is one JSON line a command: {"arguments", "cwd", "stdout", "stderr"} in;
out come the pid as soon as it runs, and its status when it has ended.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

MODULES = (
    "jax", "flax.nnx", "optax", "orbax.checkpoint.experimental.v1", "grain.python", "tensorflow_datasets",
    "array_record.python.array_record_module", "tensorstore", "tree", "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers", "matplotlib.figure", "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg", "PIL.Image", "safetensors.numpy", "pyarrow.parquet", "jinja2", "scipy.stats",
    "lsg_jax.cli", "lsg_jax.quickstart", "lsg_jax.train.loop", "lsg_jax.analysis.sweep", "lsg_jax.analysis.stack",
    "lsg_jax.analysis.ablation", "lsg_jax.analysis.probe", "lsg_jax.analysis.pointing", "lsg_jax.analysis.calibrate",
    "lsg_jax.look.look", "lsg_jax.report.page", "converters.convert", "converters.export", "converters.plant_sinks",
    "lsg_jax.__main__",
)  # fmt: skip
SMALL = {"TRAIN_SCENES": 64, "TEST_QUESTIONS": 8, "ORACLE_QUESTIONS": 8, "SHOWN_SCENES": 2, "PLANTED_SCENES": 8}
"""Sizes of the quickstart."""
STOPS = (signal.SIGTERM, signal.SIGINT)


class ForkServer:
    """The parent's side. `scratch` is the folder in which the commands make their temporary files."""

    def __init__(self, scratch):
        without_torch = Path(__file__).parents[1] / "without_torch"
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(without_torch), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "TMPDIR": str(scratch),
            "OPENBLAS_NUM_THREADS": "1",  # its threads would exist before the fork
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.scratch = scratch
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._process.stdout.readline() == "ready\n"

    def start(self, arguments, *, cwd, stdout, stderr):
        """Starts a command; returns its pid."""
        said = {"arguments": [str(each) for each in arguments], "cwd": str(cwd), "stdout": str(stdout), "stderr": str(stderr)}
        self._process.stdin.write(json.dumps(said) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait(self):
        """Waits for the command; its exit code, or minus the signal that ended it."""
        return os.waitstatus_to_exitcode(int(self._process.stdout.readline()))

    def close(self):
        self._process.stdin.close()
        self._process.wait()


def serve():
    for name in MODULES:
        importlib.import_module(name)
    import jax
    import PIL.Image

    import lsg_jax.quickstart

    PIL.Image.init()
    for name, size in SMALL.items():
        setattr(lsg_jax.quickstart, name, size)
    assert threading.active_count() == 1, threading.enumerate()
    assert not jax._src.xla_bridge.backends_are_initialized()
    print("ready", flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # until the command handles them
        pid = os.fork()
        if pid == 0:
            run(command)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


def run(command):
    """The command, in the child; does not return."""
    for number, name in enumerate((os.devnull, command["stdout"], command["stderr"])):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        descriptor = os.open(name, flags, 0o644)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(command["cwd"])
    sys.argv = ["lsg", *command["arguments"]]
    code = 1
    try:
        from lsg_jax import __main__, stopping

        stopping.handle_signals()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        __main__.run()
        code = 0
    except KeyboardInterrupt:
        stopping.end_now()
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2])]
    serve()
