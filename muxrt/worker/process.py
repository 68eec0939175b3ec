"""The process of a unit: `python -m muxrt.worker.process`, started by the API's supervisor."""

from muxrt.worker.load import load_unit
from muxrt.worker.service import run

if __name__ == "__main__":
    run(load_unit)
