"""Describes the GPU of this machine and measures a copy on it; one process of `cuda_run.py`."""

from __future__ import annotations

import json
import sys

from cuda_driver import Driver, DriverError
from cuda_timing import copy_bandwidth


def main() -> None:
    """Print one JSON object."""
    try:
        device = Driver()
    except DriverError as error:
        sys.exit(str(error))
    print(json.dumps({**device.info(), "copy_bandwidth": copy_bandwidth(device)}))


if __name__ == "__main__":
    main()
