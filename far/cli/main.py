"""Entry point of ``far``: runs a command and prints each user error as one line with exit status 2."""

import argparse
import difflib
import io
import sys
from collections.abc import Sequence
from typing import NoReturn

import far

from far.cli import (  # isort: skip
    benchmark, cache, convert, data, demo, distill, edit, evaluate, export, generate, push, recipe, train,
    train_autoencoder,
)  # fmt: skip
from far.devices import is_out_of_memory
from far.errors import InputError
from far.files import printable
from far.interrupt import Interrupted
from far.processes import leave, started_by_torchrun

COMMANDS = {
    module.__name__.rpartition(".")[2].replace("_", "-"): module
    for module in (
        generate, edit, evaluate, data, recipe, train_autoencoder, cache, train, distill, convert, export,
        benchmark, demo, push,
    )
}  # fmt: skip

# Commands that several processes can share.
SHARED = ("train-autoencoder", "cache", "train", "distill", "evaluate")

# State after an interruption, and how to continue.
_AGAIN = "finished parts are saved. Run the same command to continue"
_RESUME = "checkpoints are saved. Run the same command with --resume to continue"
_HOW_TO_RESUME = {
    "generate": "nothing was written",
    **dict.fromkeys(("cache", "data", "evaluate"), _AGAIN),
    **dict.fromkeys(("distill", "train", "train-autoencoder"), _RESUME),
}


class Parser(argparse.ArgumentParser):
    """Parser that raises an :class:`InputError` for a usage error."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}. See {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = Parser(prog="far", description=far.__doc__.splitlines()[0] if far.__doc__ else None)
    parser.add_argument("--version", action="version", version=f"far {far.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        form = argparse.RawDescriptionHelpFormatter
        command = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=form, allow_abbrev=False
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the parsed arguments; ``run`` among them is the command's function.

    Raises:
        InputError: an argument is unknown, missing or malformed.
    """
    parsed, unknown = build_parser().parse_known_args(data.with_kind(list(arguments)))
    if hasattr(parsed, "overrides"):
        # argparse takes overrides in one piece only, and leaves those after an option: RECIPE --resume
        # KEY=VALUE.
        parsed.overrides = parsed.overrides + [text for text in unknown if not text.startswith("-")]
        unknown = [text for text in unknown if text.startswith("-")]
    if unknown:
        near = difflib.get_close_matches(unknown[0], _options(parsed.command), n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"See far {parsed.command} --help"
        raise InputError(f"unknown argument {unknown[0]!r}. {hint}")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``far`` and return its exit status: 2 for a user error, 130 after Ctrl-C, 143 after SIGTERM."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: file names need not be text
    parsed = argparse.Namespace(command=None)
    try:
        parsed = parse(sys.argv[1:] if arguments is None else arguments)
        if (processes := started_by_torchrun()).count > 1:
            if parsed.command not in SHARED:
                wrong = f"far {parsed.command} cannot run in several processes, unlike {', '.join(SHARED)}"
                raise InputError(f"{wrong}. Run it without torchrun (unset WORLD_SIZE)")
            processes.local_rank()  # checks torchrun's variables before any file
        parsed.run(parsed)
    except (InputError, OSError) as error:
        return _refused(str(error))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        return _refused(f"out of memory ({reason}). Use smaller batches or more micro_batches")
    except Interrupted as interruption:  # the command has reported what it saved
        return interruption.status
    except KeyboardInterrupt as interruption:
        how = str(interruption) or _HOW_TO_RESUME.get(parsed.command)
        print(f"far: interrupted; {how}" if how else "far: interrupted", file=sys.stderr)
        return 130
    return 0


def _refused(error: str) -> int:
    print(f"far: error: {printable(error)}", file=sys.stderr)
    return 2


def program() -> NoReturn:
    """Run ``far`` and end with its exit status."""
    leave(main())


def _options(command: str) -> list[str]:
    probe = argparse.ArgumentParser()
    COMMANDS[command].add_arguments(probe)
    return [option for action in probe._actions for option in action.option_strings]


if __name__ == "__main__":
    program()
