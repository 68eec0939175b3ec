"""Random faults while sequences are handed over: no wrong token, no leak, no request stuck.

    python scripts/handoff_faults.py --faults 1000
    python scripts/handoff_faults.py --faults 1000 --borrows  # with Splitwise's routing
    python scripts/handoff_faults.py --faults 100 --transfer gloo  # by torch.distributed

Worlds of one to three units under the virtual clock, with real dispatcher, brains, kernels, memory
and transfers (tests/handoff_world.py): units are killed, transfers are lost, damaged, or late.
"""

import sys
from itertools import count
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


def main(
    faults: Annotated[int, typer.Option(min=1, help="At least so many.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the first world.")] = 100,
    borrows: Annotated[bool, typer.Option(help="Units borrow from each other.")] = False,
    transfer: Annotated[str, typer.Option(help="shared or gloo.")] = "shared",
) -> None:
    """Play worlds until there were so many faults; the first wrong token ends it."""
    from test_handoff import Played, play_faults

    console, total = Console(), Played()
    for world in count(seed):
        played = play_faults(range(world, world + 1), borrows, transfer)
        total.faults += played.faults
        total.answered += played.answered
        total.refused += played.refused
        total.switches += played.switches
        if total.faults >= faults:
            console.print(
                f"{total.faults} faults in {world - seed + 1} worlds: no token was wrong;"
                f" {total.answered} requests answered, {total.refused} ended with a 503"
                + (f"; {total.switches} switches of roles" if borrows else "")
            )
            return


if __name__ == "__main__":
    typer.run(main)
