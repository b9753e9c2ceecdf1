"""The command line: `lead-fast demo | prepare | train | audit | report | doctor`; every option also from a YAML file."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lead_fast import __version__
from lead_fast.config import PRESETS, SETTLED_OPTIONS, LeadConfig, PrepareConfig, TrainConfig, read_yaml
from lead_fast.files import os_error

logger = logging.getLogger(__name__)

_PARSERS: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "int | None": int,
    "float | None": float,
    "str | None": str,
}


_PATHS = {"model", "pool", "out", "heldout"}


def _int_or_float(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


_int_or_float.__name__ = "int or float"  # as argparse names it where a text is neither


def add_options(parser: argparse.ArgumentParser, configs: Sequence[type], hide: Sequence[str] = ()) -> None:
    """Adds every field of the dataclasses as an option; what is not given on the command line stays absent."""
    for config in configs:
        group = parser.add_argument_group(config.__name__)
        for field in dataclasses.fields(config):
            if field.name in hide:
                continue
            flag, help = "--" + field.name.replace("_", "-"), field.metadata["help"]
            default = "" if field.default is None else f" (default: {field.default})"
            common: dict[str, Any] = {
                "dest": field.name,
                "default": argparse.SUPPRESS,
                "help": (help + default).replace("%", "%%"),
            }
            kind = str(field.type)
            if kind.startswith("bool"):
                group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
                continue
            parse = _int_or_float if kind == "int | float" else _PARSERS[kind]
            metavar = None if field.metadata["choices"] else field.name.upper()
            group.add_argument(flag, type=parse, choices=field.metadata["choices"], metavar=metavar, **common)


def make_configs(options: dict[str, Any], *configs: type) -> list[Any]:
    """Instances of the dataclasses from one flat mapping.

    Raises:
        ValueError: an option that none of them has, or a value of another type; it is named.
    """
    names = {f.name for config in configs for f in dataclasses.fields(config)}
    unknown = sorted(set(options) - names)
    if unknown:
        raise ValueError(f"config: unknown option {', '.join(unknown)}")
    for config in configs:
        for f in dataclasses.fields(config):
            if f.name in options:
                options = options | {f.name: _as_typed(f.name, str(f.type).split(" | "), options[f.name])}
    return [config(**{f.name: options[f.name] for f in dataclasses.fields(config) if f.name in options}) for config in configs]


def _as_typed(name: str, kinds: list[str], value: Any) -> Any:
    """A value as YAML or the command line gave it, in a type of its option: YAML reads 1e-3 as text, and people write lists."""
    if value is None and "None" in kinds:
        return None
    if isinstance(value, bool):
        if "bool" in kinds:
            return value
    elif "str" in kinds:
        if isinstance(value, list):
            return ",".join(map(str, value))
        if isinstance(value, str | int | float):
            return str(value)
    elif isinstance(value, str | int | float) and "bool" not in kinds:
        with suppress(ValueError):
            number = _int_or_float(value) if isinstance(value, str) else value
            if "float" in kinds:
                return number if "int" in kinds else float(number)
            if float(number).is_integer():
                return int(number)
    raise ValueError(f"config: `{name}` must be {' or '.join(kinds)}, got {value!r}")


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The whole parser, and that of each command."""
    parser = argparse.ArgumentParser(
        prog="lead-fast",
        description="Chooses instruction-tuning samples while the model trains (LEAD, arXiv 2505.07437).",
    )
    parser.add_argument("--version", action="version", version=f"lead-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    of_command: dict[str, argparse.ArgumentParser] = {}

    def command(name: str, help: str, configs: Sequence[type] = ()) -> argparse.ArgumentParser:
        sub = of_command[name] = commands.add_parser(name, help=help, description=help)
        sub.add_argument("-v", "--verbose", action="store_true", default=False, help="log more")
        if configs:
            sub.add_argument("--config", metavar="FILE", help="YAML file with any of these options; the command line wins")
            add_options(sub, configs)
        return sub

    demo = command("demo", "train a tiny model with LEAD and with random selection on a generated pool, and compare")
    demo.add_argument("--out", default="demo-run", help="folder that the demo writes (default: demo-run)")
    demo.add_argument("--seeds", type=int, default=3, help="seeds for each method (default: 3)")
    demo.add_argument("--rows", type=int, default=4000, help="rows of the generated pool (default: 4000)")
    demo.add_argument("--train-tokens", type=int, default=60_000, help="trained tokens of each run (default: 60000)")
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier demo in the folder")
    command(
        "prepare",
        "warm-up, difficulty and clusters alone: writes a pool that `train` takes",
        (PrepareConfig, LeadConfig),
    )
    train = command(
        "train", "fine-tune a model with LEAD: warm-up, difficulty, clusters, rounds, report", (TrainConfig, LeadConfig)
    )
    train.add_argument(
        "--show-batch", action="store_true", default=argparse.SUPPRESS,
        help="print the first packed batch (samples, rows, position ids, tokens, which of them are supervised) and end",
    )  # fmt: skip
    audit = command("audit", "how far a run's predicted losses were from true ones: a table, audit.html, audit.json")
    audit.add_argument("run", help="folder of a run trained with --audit-every")
    report = command("report", "write report.html of a run again")
    report.add_argument("run", help="folder of a run")
    command("doctor", "what this machine will use, and what is missing")
    return parser, of_command


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's arguments; an option that it does not have ends the program, with the nearest that it has."""
    parser, of_command = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    if not unknown:
        return arguments
    known = re.findall(r"--[\w-]+", of_command[arguments.command].format_usage())
    near = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
    advice = f"did you mean {near[0]}?" if near else f"`lead-fast {arguments.command} --help` lists the options"
    parser.exit(2, f"lead-fast {arguments.command}: error: unrecognized argument {unknown[0]}; {advice}\n")


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command line and its YAML file say, the command line first."""
    given = {k: v for k, v in vars(arguments).items() if k not in ("command", "config", "verbose")}
    options = (read_yaml(arguments.config) if arguments.config else {}) | given
    for name in _PATHS & options.keys():
        if isinstance(options[name], str) and options[name].startswith("~"):  # which no shell has made a folder of
            options[name] = str(Path(options[name]).expanduser())
    return options


def _train_configs(options: dict[str, Any]) -> list[Any]:
    """The configurations of `train`: what is left out is as in the run that goes on, or as the pool was prepared."""
    options = (_began_with(options) if options.get("resume") else _prepared_with(options)) | options
    return make_configs(options, TrainConfig, LeadConfig)


def _prepared_with(options: dict[str, Any]) -> dict[str, Any]:
    """The options that a prepared pool was made by, in place of the defaults.

    Raises:
        ValueError: one that is given is another; it is named.
    """
    file = Path(str(options.get("pool"))) / "prepare.json"
    if not file.exists():
        return {}
    made_by = json.loads(file.read_text()).get("options", {})
    kinds = {f.name: str(f.type).split(" | ") for config in (TrainConfig, LeadConfig) for f in dataclasses.fields(config)}
    for name in made_by.keys() & options.keys() - set(SETTLED_OPTIONS):  # which `check_prepared` compares
        value, given = made_by[name], _as_typed(name, kinds[name], options[name])
        if given != value:
            raise ValueError(
                f"{name}: {file.parent} was prepared with {value!r}, got {given!r}; leave --{name.replace('_', '-')} out, or "
                "prepare it again"
            )
    preset = PRESETS.get(options.get("preset", "robust"), {})
    if "hard_rows" in made_by and preset.get("hard_rows", made_by["hard_rows"]) != made_by["hard_rows"]:
        logger.warning(
            "%s was prepared with hard_rows %r, and preset %s has %r: its rows stay as they are; prepare it again with that "
            "preset", file.parent, made_by["hard_rows"], options.get("preset", "robust"), preset["hard_rows"],
        )  # fmt: skip
    return made_by


def _began_with(options: dict[str, Any]) -> dict[str, Any]:
    """The options of the run that --resume goes on with, where it got as far as writing them; without --out it runs here."""
    config = Path(options.get("out") or ".") / "config.yaml"
    if not config.exists():
        return {}
    return read_yaml(config) | {"out": str(config.parent)}


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    # Imported here: the help of a command must not wait for torch and transformers.
    if arguments.command == "doctor":
        from lead_fast.doctor import examine

        return examine()
    if arguments.command == "audit":
        from lead_fast.audit_page import run_audit

        return run_audit(arguments.run)
    if arguments.command == "report":
        from lead_fast.report import write_run_report

        return {"report": str(write_run_report(arguments.run))}
    if arguments.command == "demo":
        from lead_fast.demo import run_demo

        return run_demo(arguments.out, num_seeds=arguments.seeds, num_rows=arguments.rows,
                        train_tokens=arguments.train_tokens, overwrite=arguments.overwrite)  # fmt: skip
    from lead_fast.run import run_prepare, run_train

    options = _options(arguments)
    if arguments.command == "prepare":
        return run_prepare(*make_configs(options, PrepareConfig, LeadConfig))
    if options.pop("show_batch", False):
        from lead_fast.show import show_batch

        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        text, summary = show_batch(*_train_configs(options), color=color)
        print(text)
        return summary
    return run_train(*_train_configs(options))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; the last line on stdout is a JSON summary, everything else goes to stderr.

    Of several processes (torchrun, accelerate launch) the first one speaks; the others report errors alone.

    Returns:
        0; 1 for an error that the user can mend; 130 after Ctrl-C; 143 after SIGTERM.
    """
    arguments = _parse(argv)
    rank = int(os.environ.get("RANK") or 0)
    level = logging.DEBUG if arguments.verbose else logging.INFO if rank == 0 else logging.ERROR
    logging.basicConfig(
        level=level,
        format="%(levelname)s %(message)s",
        stream=sys.stderr,
    )
    for noisy in ("httpx", "accelerate", "torch", "matplotlib", "fontTools", "urllib3", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft loads it, and it warns of kernels that are optional
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Deprecations between transformers and peft are not for the person at the terminal.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        summary = _run(arguments)
    except KeyboardInterrupt as interrupt:
        if rank == 0:
            print(f"lead-fast: interrupted; {interrupt or 'nothing is lost but the stage that ran'}", file=sys.stderr)
        return 128 + getattr(interrupt, "signum", signal.SIGINT)
    except Exception as error:
        if not isinstance(error, ValueError | OSError | RuntimeError | ImportError) and os_error(error) is None:
            raise  # a fault of this program's own: with its trace
        if arguments.verbose:
            raise
        where = "" if rank == 0 else f" in process {rank}"
        if type(error).__name__ != "FirstProcessError":  # that one speaks for all
            print(f"lead-fast: error{where}: {error}", file=sys.stderr)
        return 1
    _leave_processes()
    if rank == 0:
        try:
            print(json.dumps(summary), flush=True)
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _leave_processes() -> None:
    """Ends the group that a launcher's processes form, all of which have come this far."""
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
