"""One rank that stays alive: runs a job of `real.run` for each line of standard input, and says when it is done."""

from __future__ import annotations

import gc
import json
import sys
import warnings

from torch.distributed import PrefixStore, destroy_process_group
from torch.distributed.rendezvous import rendezvous

from real.run import Place, prepare, run

DONE = "job done"


def main() -> None:
    warnings.simplefilter("ignore")
    place, store = Place.from_launcher(), next(rendezvous("env://"))[0]
    for number, line in enumerate(sys.stdin):
        run(prepare(json.loads(line), place), PrefixStore(f"job{number}", store))
        gc.collect()  # the engines of a job refer to themselves in circles, and would stay until chance frees them
        print(DONE, flush=True)
    destroy_process_group()


if __name__ == "__main__":
    main()
