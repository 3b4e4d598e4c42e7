"""Runs the rows of benches/bench_ppo.py on a CPU, with Triton's kernels interpreted; test_gpu_kernels.py starts it.

Without times: each contender is prepared, checked against float64, called, and called as a CUDA graph would replay it.
Arguments: the names of the contenders to run; none: all. Prints a line for each.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benches"))

import clock
from contenders import KERNELS, contenders
from measurement import Absent
from peers.kernels import Agreement
from peers.train import Setting
from workload import Size


def main(names: list[str]) -> None:
    stand_in = clock.for_device("stand-in")
    for operation in KERNELS:
        for contender in contenders(operation, stand_in):
            if names and contender.name not in names:
                continue
            try:
                run = contender.prepare(Setting(Size(3, 2), stand_in.device))
            except Absent as reason:
                print(f"{operation}, {contender.name}: absent: {reason}")
                continue
            run.call()
            Agreement().check(run.outputs())
            if run.graph is not None:
                for _ in range(2):
                    run.graph.before()
                    run.graph.call()
                run.graph.check()
                Agreement().check(run.outputs())
            print(f"{operation}, {contender.name}: right")


if __name__ == "__main__":
    main(sys.argv[1:])
