"""Runs the commands of Markdown files, and compares what they print with what the files say.

    python docs/run_commands.py docs/tutorial.md ... [--update] [--folder DIR]

Each block marked `sh` is run by bash, those of all files in one folder (default: a temporary one), which has links to docs/ and
configs/ of the checkout. A block marked `text` right after it is the expected stdout; --update rewrites that block. Words must
be equal and numbers close (within 5 %, or 8): another CPU rounds differently, and one answer of fifty is two points and moves
the end of an interval by up to seven. A block below a line `<!-- not run: REASON -->` is skipped.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINKS = ("docs", "configs")
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>\S[^\n]*) -->\n)?```sh\n(?P<commands>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
RELATIVE, ABSOLUTE = 0.05, 8.0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    differ = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in LINKS:
            if not (folder / name).exists():
                (folder / name).symlink_to(ROOT / name)
        for file in options.files:
            text, wrong = run(file.read_text(encoding="utf-8"), folder)
            if options.update:
                file.write_text(text, encoding="utf-8")
                continue
            differ += len(wrong)
            for commands, expected, printed in wrong:
                print(f"{file}: after\n{commands}\nis\n{expected}\nbut this was printed\n{printed}", file=sys.stderr)
    return 1 if differ else 0


def run(text: str, folder: Path) -> tuple[str, list[tuple[str, str, str]]]:
    """Runs the blocks of a text in a folder; returns it with what they print, and (commands, expected, printed) that differ."""
    wrong: list[tuple[str, str, str]] = []

    def one(match: re.Match[str]) -> str:
        commands, expected = match["commands"], match["output"]
        if match["reason"]:
            return match[0]
        print(commands, end="", file=sys.stderr, flush=True)
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", commands], cwd=folder, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"exit code {done.returncode} of\n{commands}")
        printed = done.stdout.replace(f"{folder.resolve()}/", "")
        if expected is not None and not same(expected, printed):
            wrong.append((commands, expected, printed))
        shown = f"```sh\n{commands}```\n"
        return shown if expected is None else f"{shown}\n```text\n{printed}```\n"

    return BLOCK.sub(one, text), wrong


def same(expected: str, printed: str) -> bool:
    """Whether words are equal, however far apart, and numbers close."""
    if NUMBER.sub("0", expected).split() != NUMBER.sub("0", printed).split():
        return False
    pairs = zip(map(float, NUMBER.findall(expected)), map(float, NUMBER.findall(printed)), strict=True)
    return all(abs(a - b) <= max(ABSOLUTE, RELATIVE * abs(a)) for a, b in pairs)


if __name__ == "__main__":
    sys.exit(main())
