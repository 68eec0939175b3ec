"""Log lines of worker processes: `key=value` on stderr."""

import logging


def log_to_stderr(name: str) -> None:
    """`name` says which unit or lane speaks."""
    logging.basicConfig(
        format=f"%(asctime)s level=%(levelname)s at=%(name)s who={name} %(message)s",
        level=logging.INFO,
    )
