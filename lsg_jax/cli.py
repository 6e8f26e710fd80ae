"""The `lsg` command. Each subcommand imports what it needs when it runs; results go to stdout and files, logs to stderr."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lsg_jax.errors import InputError, LsgError

SECONDS_BETWEEN_LINES = 30.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 2 usage, others as lsg_jax.errors has them."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s", stream=sys.stderr, force=True
    )
    logging.getLogger("lsg_jax").setLevel(logging.INFO)
    logging.getLogger("converters").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.INFO if options.verbose else logging.ERROR)  # Orbax talks through it
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        options.run(options)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        code, text = _exit_code(error), str(error) if isinstance(error, LsgError) else f"{type(error).__name__}: {error}"
        if options.traceback:
            traceback.print_exc()
    print(f"lsg {options.command}: {' '.join(text.split())}", file=sys.stderr)
    return code


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.exit_code if isinstance(error, LsgError) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lsg", description="Find, understand and tame attention sinks in vision-language models."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str, parent: Any = commands) -> Any:
        sub = parent.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run)
        sub.add_argument("--traceback", action="store_true", help="print the whole traceback of an error")
        sub.add_argument("--verbose", action="store_true", help="log what the libraries do")
        return sub

    sub = command("quickstart", _quickstart, "the whole story on a tiny random model, on CPU")
    sub.add_argument("--out", type=Path, default=Path("lsg-quickstart"), metavar="DIR")

    sub = command("convert", _convert, "convert a Hugging Face LLaVA checkpoint into a model folder")
    sub.add_argument("source", metavar="SOURCE", help="local folder in HF format, or a Hub id")
    sub.add_argument("model", type=Path, metavar="MODEL", help="folder to write")
    sub.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: as stored")

    sub = command("export", _export, "write a model folder back in Hugging Face format")
    sub.add_argument("model", type=Path, metavar="MODEL")
    sub.add_argument("hf_dir", type=Path, metavar="HF_DIR")

    sub = command("inspect", _inspect, "what a model folder, run folder, prepared records or gate file holds")
    sub.add_argument("path", type=Path, metavar="PATH")
    sub.add_argument("--json", action="store_true")

    sub = command("verify", _verify, "check every digest of a model folder, run folder, prepared records or gate file")
    sub.add_argument("path", type=Path, metavar="PATH")

    sub = command("generate", _generate, "answer a question about an image; prints the answer only")
    sub.add_argument("model", type=Path, metavar="MODEL")
    sub.add_argument("--image", type=Path, metavar="FILE", help="leave out for a text-only question")
    sub.add_argument("--prompt", required=True, metavar="TEXT")
    _gate_options(sub)
    sub.add_argument("--max-new-tokens", type=int, default=128, metavar="N")

    sub = command("sinks", _sinks, "V- and L-sinks of images: JSON on stdout, overlays as PNG")
    sub.add_argument("model", type=Path, metavar="MODEL")
    sub.add_argument("--images", type=Path, nargs="+", required=True, metavar="FILE")
    sub.add_argument("--out", type=Path, metavar="DIR", help="write sinks.json and an overlay of each image")
    sub.add_argument("--prompt", default="Describe the image.", metavar="TEXT", help="the question that goes with each image")
    _gate_options(sub)

    sub = command("prepare", _prepare, "turn LLaVA JSON/JSONL or Cambrian-7M into training records, or CLEVR into probe data")
    sub.add_argument("source", type=Path, metavar="SOURCE", help="JSON array or JSONL; the folder CLEVR_v1.0 for clevr")
    sub.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    sub.add_argument("--format", choices=["llava", "cambrian", "clevr"], default="llava", help="default: llava")
    sub.add_argument("--images", type=Path, metavar="DIR", help="root of the image paths; default: the folder of SOURCE")
    sub.add_argument("--sample", type=int, metavar="N", help="cambrian: records to draw from six categories; default: 10000")
    sub.add_argument("--seed", type=int, metavar="N", help="cambrian: which records are drawn; default: 0")
    sub.add_argument("--source-map", type=Path, metavar="FILE.toml", help="cambrian: categories of further sources")
    sub.add_argument("--split", metavar="NAME", help="clevr: train or val; default: train")
    sub.add_argument("--limit", type=int, metavar="N", help="clevr: the first N scenes only")
    sub.add_argument(
        "--max-bad-fraction", type=float, default=0.01, metavar="X", help="fail above this share of rejected records"
    )
    sub.add_argument("--threads", type=int, metavar="N", help="threads that read images; default: one a core")

    sub = command("train", _train, "train gates; run it again to resume")
    sub.add_argument("config", type=Path, metavar="CONFIG")
    sub.add_argument("--set", nargs="+", action="extend", default=[], metavar="A.B=VALUE", dest="overrides")

    sub = command("eval", _eval, "accuracy of the base model and the gated one")
    sub.add_argument("config", type=Path, metavar="CONFIG")
    sub.add_argument("--set", nargs="+", action="extend", default=[], metavar="A.B=VALUE", dest="overrides")
    sub.add_argument("--gates", metavar="G", help="run folder or gate file; default: the run of CONFIG if there is one")
    sub.add_argument(
        "--benchmark",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH",
        help="Parquet file, folder or glob of a known benchmark; `scenes` needs no path; own questions as NAME=FILE.jsonl",
    )
    sub.add_argument("--out", type=Path, metavar="DIR", help="default: OUTPUT/eval")
    sub.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    sub.add_argument(
        "--multihost",
        action="store_true",
        help="one of several processes (a TPU pod slice, Slurm): find the others first",
    )

    gates = commands.add_parser("gates", help="portable gate files").add_subparsers(
        required=True, metavar="ACTION", dest="action"
    )
    sub = command("export", _gates_export, "write the gates of a run as a portable file", gates)
    sub.add_argument("run_folder", type=Path, metavar="RUN")
    sub.add_argument("file", type=Path, metavar="FILE.safetensors")
    sub = command("combine", _gates_combine, "join gates of several layers that were trained apart", gates)
    sub.add_argument("sources", nargs="+", metavar="G", help="run folders or gate files")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    sub = command("import", _gates_import, "turn a published PyTorch gate file into a portable one", gates)
    sub.add_argument("file", type=Path, metavar="FILE")
    sub.add_argument("out", type=Path, metavar="OUT.safetensors")
    sub.add_argument("--layer", type=int, metavar="L", help="the gated layer, where the file does not say")
    _sink_option(sub)
    return parser


def _gate_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--gates", metavar="G", help="run folder or gate file")
    _sink_option(sub)


def _sink_option(sub: argparse.ArgumentParser) -> None:
    text = "sink settings, e.g. criterion=norm vit_tau=100; fields as in [sinks] of a configuration"
    sub.add_argument("--sinks", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help=text)


def _quickstart(options: argparse.Namespace) -> None:
    from converters.convert import convert
    from converters.tiny_checkpoint import write_tiny_checkpoint
    from lsg_jax.quickstart import quickstart

    print(quickstart(options.out, write_checkpoint=write_tiny_checkpoint, convert=convert))


def _convert(options: argparse.Namespace) -> None:
    from converters.convert import convert

    with _progress("convert") as progress:
        convert(options.source, options.model, dtype=options.dtype, progress=progress)
    print(options.model)


def _export(options: argparse.Namespace) -> None:
    from converters.export import export

    with _progress("export") as progress:
        export(options.model, options.hf_dir, progress=progress)
    print(options.hf_dir)


def _inspect(options: argparse.Namespace) -> None:
    from lsg_jax.report.inspect import as_table, describe

    found = describe(options.path)
    print(json.dumps(found, indent=2) if options.json else as_table(found))


def _verify(options: argparse.Namespace) -> None:
    from converters.export import hf_problems
    from lsg_jax.checkpoint import read_manifest
    from lsg_jax.errors import CheckpointError
    from lsg_jax.report.inspect import kind_of, problems

    found = [str(problem) for problem in problems(options.path)]
    if kind_of(options.path) == "model":
        found += [str(problem) for problem in hf_problems(options.path, read_manifest(options.path))]
    for problem in found:
        print(problem)
    if found:
        raise CheckpointError(f"{options.path}: {len(found)} problem{'s' * (len(found) > 1)} found")
    print(f"{options.path}: ok")


def _generate(options: argparse.Namespace) -> None:
    vlm = _load(options)
    print(vlm.generate([options.image], [options.prompt], options.max_new_tokens)[0])


def _sinks(options: argparse.Namespace) -> None:
    from lsg_jax.analysis.sinks import find_sinks
    from lsg_jax.checkpoint.files import write_json
    from lsg_jax.report.overlay import draw_sinks

    vlm = _load(options)
    names = [path.stem for path in options.images]
    if options.out is not None and len(set(names)) < len(names):
        raise InputError("--images: two files have the same name, their overlays would overwrite each other")
    pixels = [vlm.processor.pixels(path) for path in options.images]
    found = dict(zip(map(str, options.images), find_sinks(vlm, pixels, options.prompt), strict=True))
    for path, entry in found.items():
        for warning in entry["warnings"]:
            logging.getLogger(__name__).warning("%s: %s", path, warning)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "sinks.json", found)
        for name, image, entry in zip(names, pixels, found.values(), strict=True):
            draw_sinks(image, entry).save(options.out / f"{name}.png")
    print(json.dumps(found))


def _prepare(options: argparse.Namespace) -> None:
    from lsg_jax.data.cambrian import prepare_cambrian
    from lsg_jax.data.clevr import prepare_clevr
    from lsg_jax.data.records import prepare_llava
    from lsg_jax.errors import ConfigError

    own = {"llava": ["images"], "cambrian": ["images", "sample", "seed", "source_map"], "clevr": ["split", "limit"]}
    every = {name for names in own.values() for name in names}
    settings = {name: value for name in sorted(every) if (value := getattr(options, name)) is not None}
    for name in settings:
        if name not in own[options.format]:
            raise ConfigError(f"--{name.replace('_', '-')} does not go with --format {options.format}")
    settings |= {"max_bad_fraction": options.max_bad_fraction, "threads": options.threads}
    if options.format != "clevr":
        settings.setdefault("images", options.source.parent)
    prepare: dict[str, Callable[..., Any]] = {
        "llava": prepare_llava,
        "cambrian": prepare_cambrian,
        "clevr": prepare_clevr,
    }
    with _progress("prepare") as progress:
        report = prepare[options.format](options.source, out=options.out, progress=progress, **settings)
    print(report.summary())


def _train(options: argparse.Namespace) -> None:
    from lsg_jax.config import load_run_config
    from lsg_jax.train.loop import train

    config = load_run_config(options.config, options.overrides)
    with _progress("train") as progress:
        folder = train(config, on_step=lambda step, total, m: progress(step, total, f"loss {m['loss']:.4f}"))
    print(folder)


def _eval(options: argparse.Namespace) -> None:
    import dataclasses

    import jax

    import lsg_jax
    from lsg_jax.config import load_run_config
    from lsg_jax.eval.runner import ask_all, evaluate
    from lsg_jax.eval.table import table
    from lsg_jax.sharding import make_mesh

    config = load_run_config(options.config, options.overrides)
    if options.multihost:
        jax.distributed.initialize()
    benchmarks = dict(config.eval.benchmarks)
    for pair in options.benchmark:
        name, _, path = pair.partition("=")
        benchmarks[name] = path
    settings = dataclasses.replace(config.eval, benchmarks=benchmarks)
    asked = ask_all(settings)  # a wrong file shows before the model is loaded
    output = Path(config.output)
    gates = options.gates or (output if (output / "run.json").exists() else None)
    vlm = lsg_jax.load(config.model, gates, dtype=config.dtype, mesh=make_mesh(config.mesh), sinks=config.sinks)
    with _progress("eval") as progress:
        tell = lambda what, done, total: progress(done, total, what)
        result = evaluate(vlm, settings, options.out or output / "eval", asked=asked, progress=tell)
    if jax.process_index() == 0:
        print(json.dumps(result, indent=2) if options.json else table(result))


def _gates_export(options: argparse.Namespace) -> None:
    from lsg_jax.gating.portable import write_gates
    from lsg_jax.vlm import open_gates

    write_gates(options.file, open_gates(options.run_folder))
    print(options.file)


def _gates_combine(options: argparse.Namespace) -> None:
    from lsg_jax.gating.portable import combine_gates, write_gates
    from lsg_jax.vlm import open_gates

    write_gates(options.out, combine_gates([open_gates(source) for source in options.sources]))
    print(options.out)


def _gates_import(options: argparse.Namespace) -> None:
    from converters.gates import import_torch_gates
    from lsg_jax.config import SinkConfig
    from lsg_jax.gating.portable import write_gates

    write_gates(options.out, import_torch_gates(options.file, sinks=_sink_config(options, SinkConfig()), layer=options.layer))
    print(options.out)


def _load(options: argparse.Namespace) -> Any:
    import lsg_jax

    vlm = lsg_jax.load(options.model, options.gates)
    if options.sinks:
        vlm = lsg_jax.load(options.model, options.gates, sinks=_sink_config(options, vlm.config.sinks))
    return vlm


def _sink_config(options: argparse.Namespace, base: Any) -> Any:
    """The sink settings `base` with the fields of --sinks."""
    from lsg_jax.config import SinkConfig, apply_override, from_dict, to_dict

    tree = to_dict(base)
    for override in options.sinks:
        apply_override(tree, override, where="--sinks")
    return from_dict(SinkConfig, tree, where="--sinks")


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr, or a line now and then where that is no terminal: call with (done, total or None, text)."""
    if not sys.stderr.isatty():
        last = time.monotonic()

        def tell(done: int, total: int | None = None, text: str = "") -> None:
            nonlocal last
            if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                print(f"{what} {done}{f'/{total}' if total else ''} {text}".rstrip(), file=sys.stderr, flush=True)

        yield tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)

        def show(done: int, total: int | None = None, text: str = "") -> None:
            bar.update(task, completed=done, total=total, description=f"{what} {text}".strip())

        yield show


if __name__ == "__main__":
    sys.exit(main())
