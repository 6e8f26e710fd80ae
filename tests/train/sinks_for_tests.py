"""What stands behind metrics sinks in tests: a reader of TensorBoard's files, and a stand-in for W&B."""

import struct
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

from tensorboardX.proto.event_pb2 import Event, SessionLog


def points(folder):
    """{step: {tag: value}}, as TensorBoard shows it: a START hides its step and later ones of the files before it."""
    found = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            size = struct.unpack("<Q", data[:8])[0]
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            if event.session_log.status == SessionLog.START:
                found = {step: values for step, values in found.items() if step < event.step}
            for value in event.summary.value:
                assert value.tag not in found.setdefault(event.step, {})
                found[event.step][value.tag] = value.simple_value
    return found


class Wandb(SimpleNamespace):
    """Stands in for the module wandb: keeps what it is told in `runs`."""

    def __init__(self, **fails):
        super().__init__(runs=[], fails=fails, __spec__=ModuleSpec("wandb", None))

    def init(self, **settings):
        self.raise_if("init")
        self.runs.append(SimpleNamespace(settings=settings, told={}, ended=0))
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, values, step):
        self.raise_if("log", step)
        self.runs[-1].told[step] = values

    def finish(self):
        self.raise_if("finish")
        self.runs[-1].ended += 1

    def raise_if(self, name, step=0):
        if name in self.fails and step >= self.fails[name]:
            raise ValueError(f"{name}\nfailed")
