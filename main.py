"""U-Net for microscopy: train it on a database, test it, segment images, or export it.

python run_make_database.py --name_data em  (first: make the database)
python main.py --mode train --name_data em
python main.py --mode test  --name_data em
python main.py --mode predict --name_data em --input new.tif --output segmented.tif
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from arguments import parse
from config import Config
from device import is_worker, pick_device
from utils import UserError, is_out_of_memory, program

if TYPE_CHECKING:
    import torch

    from distributed import World


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
    from images.memory import keep_memory

    if not is_worker() and (num_gpu := distributed.num_gpu(config.gpu_ids)) > 1:
        return distributed.launch(num_gpu, [__file__, *(sys.argv[1:] if argv is None else argv)])
    device = pick_device("-1" if config.mode == "export" else config.gpu_ids)  # exports run on the CPU
    if device.type == "cpu":
        keep_memory()
    run, advice = MODES[config.mode]
    with memory_advice(advice), distributed.joined(device, config.dist_timeout) as world:
        return run(config, device, world)


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Turn an out-of-memory error into a `UserError` with advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise UserError(f"out of memory: {advice}") from error
        raise


def _train(config: Config, device: torch.device, world: World) -> int:
    from train import Trainer

    return Trainer(config, device, world).train()


def _test(config: Config, device: torch.device, world: World) -> int:
    from evaluation.test import run_test

    return run_test(config, device, world)


def _predict(config: Config, device: torch.device, world: World) -> int:
    from predict import predict_files

    return predict_files(config, device, world)


def _export(config: Config, _device: torch.device, world: World) -> int:
    from prediction.export import export

    return export(config) if world.is_main else 0  # the others wait for it


# what `--mode` does, and the advice where memory does not suffice; each row imports only the modules that it needs
MODES: dict[str, tuple[Callable[[Config, torch.device, World], int], str]] = {
    "train": (_train, "lower --batch_size, --ny_load and --nx_load, --nch_ker or --cache_gb"),
    "test": (_test, "give a smaller --tile, such as 128"),
    "predict": (_predict, "give a smaller --tile, such as 128"),
    "export": (_export, "close other programs, or use a machine with more"),
}


if __name__ == "__main__":
    sys.exit(main())
