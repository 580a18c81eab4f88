"""The command `powerflow-fast`: train, demo, eval, forecast, merge, plan, info.

Bad input ends with one line on stderr and exit code 2. Nothing heavy is imported before a command
needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from powerflow_fast.cli.common import (
    Parser,
    UsageError,
    let_threads_sleep,
    offline_without_hub,
    quiet,
)
from powerflow_fast.cli.demo import add_demo
from powerflow_fast.cli.info import add_info
from powerflow_fast.cli.measuring import add_eval, add_forecast
from powerflow_fast.cli.merge import add_merge
from powerflow_fast.cli.plan import add_plan
from powerflow_fast.data.errors import one_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` names (default: the process's); returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    let_threads_sleep()
    quiet()
    try:
        if argv and argv[0] in ("train", "eval", "forecast", "merge", "plan"):
            offline_without_hub()
        if argv[:1] == ["train"]:  # its options come from dataclasses that take seconds to import
            from powerflow_fast.cli.train import train

            return train(argv[1:])
        parser = _parser()
        if not argv:
            parser.print_help()
            return 0
        args = parser.parse_args(argv)
        return args.run(args)
    except UsageError as error:
        print(f"powerflow-fast: error: {one_line(error)}", file=sys.stderr)
        return 2


def _parser() -> Parser:
    from powerflow_fast import __version__

    parser = Parser(
        prog="powerflow-fast",
        description="Train a language model to sample from a power of itself, without labels.",
        epilog="powerflow-fast COMMAND --help tells the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"powerflow-fast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    commands.required, parser.commands = True, commands
    add_demo(commands)
    commands.add_parser("train", help="train on prompts (flags, or --config FILE.yaml)")
    for add in (add_eval, add_forecast, add_merge, add_plan, add_info):
        add(commands)
    return parser
