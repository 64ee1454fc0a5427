"""`python -m converters KIND IN OUT`: convert a checkpoint to one self-describing safetensors file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from converters import KINDS, convert
from runtime.errors import ConvertError


def main(arguments: list[str] | None = None) -> int:
    parser = _Parser(
        prog="python -m converters",
        description="Convert a checkpoint to one self-describing safetensors file.",
        epilog="\n".join(f"  {kind:8} IN is {text}" for kind, text in KINDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("source", metavar="IN", type=Path)
    parser.add_argument("target", metavar="OUT", type=Path)
    parser.add_argument("--force", action="store_true", help="overwrite OUT if it exists")
    parser.add_argument(
        "--dtype", choices=("f16", "bf16", "f32"),
        help="type of the matrices (default: each keeps its own; quantized ones become f16)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        dtype = options.dtype and options.dtype.upper()
        size = convert(options.kind, options.source, options.target, dtype=dtype, force=options.force)
    except ConvertError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"{options.target}: {size / 2**20:.1f} MiB")
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")  # one line, as of all commands


if __name__ == "__main__":
    sys.exit(main())
