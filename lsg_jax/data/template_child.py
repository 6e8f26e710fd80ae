"""Renders chat templates in a process of its own, which `template_process` starts. It imports Jinja only.

Run as a script with a memory limit in bytes and a time limit in seconds of CPU a template. Each line of stdin is {"source",
"values"} in JSON; each line of stdout is {"text"} or {"error"}. It ends with stdin, or where a limit is passed.
"""

from __future__ import annotations

import functools
import json
import signal
import sys
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(Extension):
    """`{% generation %}`, which marks what the assistant says in training; here it prints what it holds."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own way)

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(16)
def _compiled(source: str) -> jinja2.Template:
    """The template as transformers compiles it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], cache_size=0
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    return environment.from_string(source)


def _answer(line: bytes) -> dict[str, str]:
    try:
        asked = json.loads(line)
        template = _compiled(asked["source"])
        return {"text": template.render(asked["values"])}
    except MemoryError:
        raise
    except Exception as error:  # Jinja raises several types, and what the template raises
        return {"error": " ".join(f"{type(error).__name__}: {error}"[:500].split())}


def main(memory: int, seconds: int) -> None:
    """Answers until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; this one ends with its parent
    try:
        import resource
    except ImportError:  # Windows
        resource = None  # type: ignore[assignment]
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        if resource is not None:
            used = resource.getrusage(resource.RUSAGE_SELF)
            resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + seconds, resource.RLIM_INFINITY))
        sys.stdout.buffer.write(json.dumps(_answer(line)).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
