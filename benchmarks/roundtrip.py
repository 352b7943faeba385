"""Round trips of every transport beside a plain copy: `tokenferry bench roundtrip` as a script that also writes JSON lines.

python benchmarks/roundtrip.py OUTPUT.jsonl [--ranks 2] [--commit HASH] [--transports p2p,collective]
    [--capacity C [--exact-too]] [--hidden 7168,2048] [--tokens 1,8,32]
    [--format same,fp8_block128,fp8_block128-quantized,bytes] [--combine-format same,fp8_block128,fp8_block128-quantized]
"""

import argparse
import sys
from pathlib import Path

from tokenferry.cli.bench import round_trip_command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--transports", default="p2p,collective")
    parser.add_argument("--capacity", type=int)
    parser.add_argument("--rehearse", action="store_true", help="on CPUs, with tiny sizes: every call and check, no figures")
    parser.add_argument("--exact-too", action="store_true", help="with --capacity: p2p in workspaces of C = T too")
    parser.add_argument("--hidden", default="7168,2048")
    parser.add_argument("--tokens", default="1,8,32,128,512,4096")
    parser.add_argument("--format", default="same", help="same, fp8_block128, fp8_block128-quantized, bytes; several with commas")
    parser.add_argument(
        "--combine-format", default="same", help="same, fp8_block128, fp8_block128-quantized; several with commas"
    )
    given = parser.parse_args()
    hidden_sizes = [int(size) for size in given.hidden.split(",")]
    tokens = [int(count) for count in given.tokens.split(",")]
    transports = given.transports.split(",")
    return round_trip_command(
        given.ranks,
        given.output,
        hidden_sizes=hidden_sizes,
        tokens=tokens,
        transports=transports,
        capacity=given.capacity,
        exact_too=given.exact_too,
        formats=given.format.split(","),
        combine_formats=given.combine_format.split(","),
        commit=given.commit,
        rehearse=given.rehearse,
    )


if __name__ == "__main__":
    sys.exit(main())
