"""U-Net for microscopy: train it on a database, test it, segment images, or export it.

python run_make_database.py --name_data em  (first: make the database)
python main.py --mode train --name_data em
python main.py --mode test  --name_data em
python main.py --mode predict --name_data em --input new.tif --output segmented.tif
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from config import Config, parse
from utils import is_worker, memory_advice, pick_device, program

if TYPE_CHECKING:
    import torch

    from distributed import World

MEMORY_ADVICE = {
    "train": "lower --batch_size, --ny_load and --nx_load, --nch_ker or --cache_gb",
    "test": "give a smaller --tile, such as 128",
    "predict": "give a smaller --tile, such as 128",
    "export": "close other programs, or use a machine with more",
}


@program
def main(argv: list[str] | None = None) -> int:
    """Train, test, predict or export as the flags say, and return the exit status.

    Parameters
    ----------
    argv : list of str, optional
        Arguments without the program's name; default: those of the process.
    """
    config = parse(Config, argv, __doc__)
    import distributed  # here, so that --help needs no torch

    if not is_worker() and (num_gpu := distributed.num_gpu(config.gpu_ids)) > 1:
        return distributed.launch(num_gpu, [__file__, *(sys.argv[1:] if argv is None else argv)])
    device = pick_device("-1" if config.mode == "export" else config.gpu_ids)  # exports run on the CPU
    with memory_advice(MEMORY_ADVICE[config.mode]), distributed.joined(device, config.dist_timeout) as world:
        return _run(config, device, world)


def _run(config: Config, device: torch.device, world: World) -> int:
    """Do what `--mode` says, and return the exit status; only the modules that it needs are imported."""
    if config.mode == "predict":
        from predict import predict_files

        return predict_files(config, device, world)
    if config.mode == "export":
        from prediction.export import export

        return export(config) if world.is_main else 0  # the others wait for it
    if config.mode == "test":
        from evaluation.test import run_test

        return run_test(config, device, world)
    from train import Trainer

    return Trainer(config, device, world).train()


if __name__ == "__main__":
    sys.exit(main())
