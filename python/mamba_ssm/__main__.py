"""Command line: ``python -m mamba_ssm [--cmake-dir] [demo | doctor | bench]``."""

import argparse
import sys

from mamba_ssm import __version__, _library, bench, demo, doctor


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mamba_ssm", description="mamba_ssm tools")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "--cmake-dir",
        action="store_true",
        help="print the folder of mamba_ssmConfig.cmake, for -Dmamba_ssm_DIR=...",
    )
    commands = parser.add_subparsers(dest="command", metavar="{demo,doctor,bench}")
    for module in (demo, doctor, bench):
        name = module.__name__.rpartition(".")[2]
        summary = module.__doc__.partition("\n")[0]
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    if args.cmake_dir:
        print(_library.LIBRARY_DIR / "cmake" / "mamba_ssm")
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
