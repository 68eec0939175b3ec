"""A traffic log as a Parquet file, for who has pyarrow: `pip install 'muxrt[parquet]'`."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import pyarrow as pa
from pyarrow.parquet import ParquetWriter

from muxrt.server.traffic_files import Entry

GROUP = 100_000  # rows that are in memory at a time
# The columns of the .csv, in its order; times as such.
SCHEMA = pa.schema(
    [
        ("time", pa.timestamp("us", tz="UTC")),
        ("model", pa.string()),
        ("prompt", pa.int64()),
        ("output", pa.int64()),
        ("ttft_s", pa.float64()),
        ("tpot_s", pa.float64()),
        ("status", pa.int32()),
        ("unit", pa.string()),
        ("key", pa.int64()),
        ("sequences", pa.int64()),
    ]
)


def write_parquet(path: Path, entries: Iterable[Entry]) -> int:
    """All columns, what has no value as null; how many rows. Raises OSError."""
    left, count = iter(entries), 0
    with ParquetWriter(path, SCHEMA) as writer:
        while group := list(islice(left, GROUP)):
            writer.write_table(_table(group))
            count += len(group)
    return count


def _table(entries: list[Entry]) -> pa.Table:
    first, *others = Entry.__struct_fields__
    columns = [[round(1e6 * getattr(one, first)) for one in entries]]
    columns += [[getattr(one, name) for one in entries] for name in others]
    arrays = [pa.array(c, field.type) for c, field in zip(columns, SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)
