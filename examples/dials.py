"""Record sweeps on CIFAR-10, fit a dial to each, and judge it at conditions that were never trained."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from dial_workloads import WORKLOADS
from workload_data import cifar10, synthetic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["record", "judge", "table"])
    parser.add_argument("workload", choices=sorted(WORKLOADS))
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10")
    parser.add_argument("--out", type=Path, help="folder of this workload and seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="synthetic images, everything but brief")
    parser.add_argument("--num-threads", type=int, default=None)
    options = parser.parse_args()
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    train, test = synthetic() if options.smoke else cifar10(options.data)
    sweep = WORKLOADS[options.workload](options.out, train, test, options.seed, options.smoke)
    if options.command == "record":
        sweep.record()


if __name__ == "__main__":
    main()
