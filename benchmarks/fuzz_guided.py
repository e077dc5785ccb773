"""Mutants of a sidecar that atheris looks for, by which lines of the package they reach; see `fuzz.py`, which runs this.

python benchmarks/fuzz_guided.py RUNS TARGET
"""

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fisher_mask_mergekit", "json"]):
    import fuzz


def main() -> None:
    runs, name = int(sys.argv[1]), sys.argv[2]
    sys.path.insert(0, str(fuzz.HERE.parent))
    with tempfile.TemporaryDirectory() as folder:
        target = fuzz.targets(Path(folder))[name]
        tally = fuzz.Tally(replace(target, change=f"{target.change}, guided by coverage"))
        judge = tally.test(runs, 0).hypothesis.fuzz_one_input

        def once(content: bytes) -> None:
            judge(content)
            if tally.counts.total() == runs:
                print(json.dumps({"rows": [tally.row()], "reasons": tally.reasons}), flush=True)
                os._exit(0)  # atheris does not return.

        atheris.Setup([sys.argv[0], "-seed=1", "-rss_limit_mb=8192", "-max_len=4096"], once)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
