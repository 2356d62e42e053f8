"""Command line: ``mamba-ssm`` or ``python -m mamba_ssm``, and a command; see its --help."""

import argparse
import sys

from mamba_ssm import __version__, _library, bench, convert, demo, doctor, generate, train
from mamba_ssm._command import ArgumentError

COMMANDS = (demo, train, generate, bench, doctor, convert)
EPILOG = """\
examples:
  mamba-ssm train book.txt --out model --minutes 10
  mamba-ssm generate model --prompt "It was "
  mamba-ssm COMMAND --help

exit codes: 0 done, 1 failed, 2 wrong arguments, 130 interrupted
"""


def main(argv: list[str] | None = None) -> int:
    """Runs a command. Returns its exit code; argparse itself leaves with SystemExit(2)."""
    parser = argparse.ArgumentParser(
        prog="mamba-ssm",
        description="Trains, runs and checks models of the Mamba family.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "--cmake-dir",
        action="store_true",
        help="print the folder of mamba_ssmConfig.cmake, for -Dmamba_ssm_DIR=...",
    )
    names = [module.__name__.rpartition(".")[2] for module in COMMANDS]
    commands = parser.add_subparsers(dest="command", metavar=f"{{{','.join(names)}}}")
    for name, module in zip(names, COMMANDS):
        summary = module.__doc__.partition("\n")[0]
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    if args.cmake_dir:
        print(_library.LIBRARY_DIR / "cmake" / "mamba_ssm")
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    try:
        return args.run(args)
    except ArgumentError as error:
        print(f"mamba-ssm {args.command}: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print(f"mamba-ssm {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
