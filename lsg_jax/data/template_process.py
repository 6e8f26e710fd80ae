"""Chat templates are foreign code: another process renders them, whose time and memory the system bounds.

Jinja's sandbox keeps a template from files and attributes, but not from loops without end or texts of any length. A process can
be ended whatever a template does, so nothing has to be known of what it may do.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SECONDS = 10  # of CPU that one prompt may take; published templates take milliseconds
MEMORY = 512 << 20  # bytes of address space; Python and Jinja take some 40 MiB of it
MAX_TEXT = 64 << 20  # bytes of an answer

_CHILD = Path(__file__).with_name("template_child.py")


class TemplateError(Exception):
    """A template is broken, raises an error, or takes more time or memory than it may."""


class TemplateProcess:
    """Renders templates in a process that is started when it is first needed, and anew after one that had to be ended.

    It may be used from several threads.
    """

    def __init__(self, *, seconds: int = SECONDS, memory: int = MEMORY):
        self._limits = (memory, seconds)
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._parent = 0

    def render(self, source: str, values: Mapping[str, Any]) -> str:
        """The text of a template. Raises TemplateError."""
        asked = json.dumps({"source": source, "values": values}).encode() + b"\n"
        with self._lock:
            child = self._running()
            assert child.stdin is not None and child.stdout is not None
            try:
                child.stdin.write(asked)
                child.stdin.flush()
                line = child.stdout.readline(MAX_TEXT)
            except BrokenPipeError:
                line = b""
            except BaseException:  # an interrupt: its answer would be read as the next one's
                self.close()
                raise
            if not line.endswith(b"\n"):
                self.close()
                memory, seconds = self._limits
                raise TemplateError(f"it takes more than {seconds} s, {memory >> 20} MiB or {MAX_TEXT >> 20} MiB of text")
        answer: dict[str, str] = json.loads(line)
        if "error" in answer:
            raise TemplateError(answer["error"])
        return answer["text"]

    def _running(self) -> subprocess.Popen[bytes]:
        """The child of this process; a fork must not share its parent's."""
        if self._child is None or self._parent != os.getpid():
            self._parent = os.getpid()
            command = [sys.executable, "-P", str(_CHILD), *map(str, self._limits)]
            self._child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=-1
            )
        return self._child

    def close(self) -> None:
        """Ends the child, if there is one."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):  # what could not be written
                    pipe.close()  # type: ignore[union-attr]


RENDERER = TemplateProcess()
"""That of this process, for all models: it takes a fifth of a second to start."""
