"""Training: one loop over batches, and the Trainer around it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
import distributed
from checkpoint import Checkpoint
from config import Config
from dataset import ENTRIES, DataInfo, SampleFile, list_samples, load_info
from distributed import World
from evaluation.scorers import checked_samples
from evaluation.tables import Scores
from evaluation.validation import Validation
from files import check_writable, locked, move_aside
from prediction.predictor import find_background
from training.augment import Augmentation
from training.best import BestEpoch
from training.compiled import maybe_compile
from training.loader import LoaderOptions, TrainingBatches, memory_for
from training.log import Log, NoLog, TrainingLog, command_line, say_what_is_trained, write_arguments
from training.losses import LOSSES, Loss, check_finite, cross_entropy
from training.optim import learning_rate
from training.patches import Batch, PatchDataset
from training.progress import Progress
from training.state import TrainState, changed_flags, hyperparameters, kept_architecture, num_weight
from training.transfer import start_from
from training.weight_map import cache_border_distances, loss_of, pixel_weight
from utils import FlagError, UserError, pick_precision, say


def run_epoch(
    net: nn.Module,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    after_step: Callable[[], None] | None = None,
    *,
    criterion: Loss = cross_entropy,
    clip: float = 0.0,
    precision: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> list[Tensor]:
    """Train a network on batches.

    Parameters
    ----------
    net : nn.Module
        (N, C, H, W) to logits (N, K, H, W).
    batches : iterable of dict
        On the device of the network.
    optimizer : Optimizer
        Updates the weights after each batch.
    after_step : callable, optional
        Called after each update.
    criterion : callable
        Loss function of the logits, the label and the batch's `weight`, or None without one.
    clip : float
        Clip the gradient norm to this value; 0 = off.
    precision : torch.dtype, optional
        For mixed precision, see `pick_precision`; logits and loss are float32.
    scaler : GradScaler, optional
        Scaler of the loss, for float16.

    Returns
    -------
    list of Tensor
        Mean loss of each batch, still on the device, so that nothing here waits for a GPU.
    """
    net.train()
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    torch.backends.cudnn.benchmark = True  # crops are of one size; whole images, between epochs, are not
    losses = []
    for batch in batches:
        if "seed" in batch:
            torch.manual_seed(batch["seed"])  # for dropout
        with torch.autocast(batch["input"].device.type, precision, enabled=precision is not None):
            logits = net(batch["input"])
        loss = criterion(logits.float(), batch["label"], batch.get("weight")) * batch.get("loss_scale", 1)
        _step(optimizer, loss, clip, scaler)
        losses.append(loss.detach())
        if after_step is not None:
            after_step()
    torch.backends.cudnn.benchmark = False
    return losses


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, clip: float, scaler: torch.amp.GradScaler) -> None:
    """Update the weights after a batch."""
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    if clip:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], clip)
    scaler.step(optimizer)
    scaler.update()


class Trainer:
    """Sets up the data, the network and the log of a run, and trains.

    Parameters
    ----------
    config : Config
        The flags.
    device : torch.device
        Device to train on.
    world : World, optional
        The processes of the run; default: only this one.
    """

    def __init__(self, config: Config, device: torch.device, world: World | None = None) -> None:
        self.config, self.device, self.world = config, device, world or World()
        self.dir_data, self.dir_checkpoint, self.dir_log = map(config.folder, ("data", "checkpoint", "log"))
        self.precision = pick_precision(config.amp, self.device)
        self.progress = Progress(config.num_epoch, config.max_minutes, self.world)
        self.best = BestEpoch(config.best_score, config.patience, self.dir_checkpoint)

    def train(self) -> int:
        """Train to the last epoch.

        Returns
        -------
        int
            Exit status: 0, or 128 plus the number of the signal that stopped the training, which is then saved.

        Raises
        ------
        UserError
            The data or the checkpoint can't be used, or the loss is no longer finite.
        """
        if self.config.batch_size < self.world.size:
            what = f"--batch_size {self.config.batch_size}: {self.world.size} processes share a batch"
            raise FlagError(f"{what}: raise it to {self.world.size} or more, or start fewer")
        with ExitStack() as locks:
            return self._train(locks)

    def _train(self, locks: ExitStack) -> int:
        """Train while no other process can write to the folders of the run or replace its samples."""
        if self.dir_checkpoint.is_dir():
            self._lock(locks)
        locks.enter_context(self.world.reading(self.dir_data, ENTRIES, "choose another --name_data"))
        restarted = self._was_restarted()
        epoch = 0 if restarted else self.config.epoch
        state = self._resume(epoch) if restarted or self.config.train_continue else self._begin()
        self.progress.seconds_before = state.seconds
        if self.progress.sync(state.epoch - 1) >= 1:
            self._say(f"already trained to epoch {state.epoch - 1}: raise --num_epoch or --max_minutes to train longer")
            return 0
        if state.epoch > state.saved_epoch and self.best.is_over(state, state.saved_epoch):
            why = self.best.reason(state, state.saved_epoch)
            self._say(f"trained to epoch {state.saved_epoch} already{why}: raise --patience to resume")
            return 0
        train = list_samples(self.dir_data / "train")
        val = list_samples(self.dir_data / "val") if (self.dir_data / "val").is_dir() else []
        batches, validation = self._batches(state, train, val), self._validation(state.info, val)
        self._lock(locks)
        if why := state.plan_epoch(batches.plan, len(batches)):
            self._say(f"note: epoch {state.epoch} starts again: {why}")
        return self._epochs(state, batches, validation)

    def _epochs(self, state: TrainState, batches: TrainingBatches, validation: Validation | None) -> int:
        """Train epoch by epoch, until the last one or a signal."""
        num_step = len(batches) * (self.config.num_epoch - state.epoch + 1)
        net = self.world.wrap(state.net)
        net = maybe_compile(net, self.config.compile, self.device, num_step, self.config.max_minutes)
        if self.world.is_main:
            self._open_folders(state)
        with self._log(state) as log, self.progress.stop:
            log.arguments(state.epoch, self.config.as_typed())
            last = False
            while not (last or self.progress.is_stopping()):
                scores = self._train_epoch(state, net, batches)
                last = self.progress.sync(state.epoch) >= 1
                if validation and not self.progress.is_stopping():
                    with self._save_on_error(state):
                        scores |= self._validate(state, validation, log, last)
                    last = last or self.best.is_over(state, state.epoch)
                if self.progress.is_stopping():
                    path = self._save_stopped(state, validation)
                    break
                with self.progress.stop.unless_read():
                    log.scalars(state.epoch, scores, self.progress.fraction(state.epoch))
                if last:
                    log.hparams(state.epoch, hyperparameters(self.config), scores)
                if last or state.epoch % self.config.num_freq_save == 0:
                    path = self._save(state, whole=True)
                state.next_epoch()
        if self.progress.is_stopping():
            return self._say_stopped(state, len(batches), path)
        why, best = self.best.reason(state, state.epoch - 1), self.best.describe(state)
        self._say(f"trained to epoch {state.epoch - 1}{why}, saved {path}{best}")
        return 0

    def _train_epoch(self, state: TrainState, net: nn.Module, batches: TrainingBatches) -> Scores:
        """Train the remaining batches of an epoch; their losses are added to the state."""
        start, first = time.perf_counter(), len(state.losses)
        update_average = partial(state.average.update, state.net) if state.average else None
        losses = run_epoch(
            net,
            self._remaining_batches(state, batches),
            state.optimizer,
            update_average,
            criterion=LOSSES[loss_of(self.config.loss, state.info.num_class)],
            clip=self.config.clip,
            precision=self.precision,
            scaler=state.scaler,
        )
        if losses:  # the only wait for the device in an epoch
            state.losses += (self.world.sum(torch.stack(losses)) / self.world.size).tolist()
        seconds = time.perf_counter() - start
        done = batches.files_of(state.epoch)[: len(state.losses)]
        for step, (loss, files) in enumerate(zip(state.losses, done, strict=True), 1):
            check_finite(loss, f"epoch {state.epoch}, step {step}", files)
        sizes = [len(files) for files in done]
        return {
            "loss/train": float(np.average(state.losses, weights=sizes)) if sizes else 0.0,
            "learning_rate": state.optimizer.param_groups[0]["lr"],
            "images_per_second": sum(sizes[first:]) / seconds,
        }

    def _remaining_batches(self, state: TrainState, batches: TrainingBatches) -> Iterator[Batch]:
        """Remaining batches of an epoch, each with its learning rate set; ends at a signal or when the time is up."""
        config, first = self.config, len(state.losses)
        for step, batch in enumerate(batches.of(state.epoch, first), first):
            progress = self.progress.sync(state.epoch - 1 + step / len(batches))
            if self.progress.is_stopping() or (config.max_minutes and progress >= 1 and step > first):
                return
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate(progress, config.lr, config.schedule, config.warmup)
            yield batch

    def _validate(self, state: TrainState, validation: Validation, log: Log, last: bool) -> Scores:
        """Scores on the validation set, with those of segments when they are due; the best epoch is kept."""
        config, epoch = self.config, state.epoch
        last = last or self.best.is_over(state, epoch)  # it is, unless this epoch is better
        saved = last or epoch % config.num_freq_save == 0
        scorer = validation.score_pixels(state, pictures=last or epoch == 1 or epoch % config.num_freq_disp == 0)
        if scorer is None:
            return {}
        for loss, file in zip(scorer.losses, validation.files, strict=True):
            check_finite(loss, f"the validation set after epoch {epoch}", [file])
        log.images(epoch, scorer.pictures or {})
        scorer.pictures = None  # three bytes per pixel that the next scores need themselves
        challenge = validation.score_segments(state) if saved or epoch % config.num_freq_score == 0 else None
        if self.progress.is_stopping():
            return {}
        if challenge:
            log.precision_recall(epoch, challenge.counts)
        scores = scorer.scores(challenge)
        take = partial(state.checkpoint, config, whole=True, seconds=self.progress.seconds)
        self.best.update(state, scores, take, has_threshold=bool(challenge) or state.info.num_class > 2)
        if saved:
            self.best.choose_threshold(state, validation.score_segments)
        return scores

    def _begin(self) -> TrainState:
        """State of a new training."""
        info = replace(load_info(self.dir_data), normalize=self.config.normalize)
        if info.num_class < 2:
            found = info.class_values
            what = f"the labels have only one class, {found}" if found else "made with --label none"
            raise UserError(f"{self.dir_data}: {what}: nothing to learn: make it with other labels")
        state = TrainState.begin(self.config, info, self.device, self.precision)
        if self.config.init_from:
            self._say(start_from(state, Path(self.config.init_from)))
        return state

    def _resume(self, epoch: int | str) -> TrainState:
        """State from the checkpoint of an epoch; 0: the newest."""
        path = checkpoint.find(self.dir_checkpoint, epoch)
        saved = Checkpoint.load_for(path, self.dir_data)
        state = TrainState.resume(saved, path, self.config, self.device, self.precision)
        for note in changed_flags(saved, self.config) + self.best.resume(saved, state, self.world):
            self._say(f"note: {note}")
        self.config = replace(self.config, **kept_architecture(saved, self.config))
        self._say(f"resuming from {path}")
        return state

    def _was_restarted(self) -> bool:
        """Whether torchrun has restarted this run after it had saved a checkpoint."""
        own = False
        if self.world.is_main and distributed.restarts() and checkpoint.list_epochs(self.dir_checkpoint):
            path = checkpoint.find(self.dir_checkpoint, 0)
            own = Checkpoint.load(path).run == distributed.run_id()
        return self.world.broadcast(own)

    def _batches(self, state: TrainState, files: list[SampleFile], val: list[SampleFile]) -> TrainingBatches:
        """Batches of the training set, with pixel weights if the loss needs them."""
        config, info = self.config, state.info
        weighted = loss_of(self.config.loss, info.num_class) == "wbce"
        if not weighted and (given := config.given("balance", "w0", "sigma")):
            raise FlagError(f"{given}: applies to --loss wbce: give that, or leave it out")
        if weighted and self.world.is_main:
            cache_border_distances(files, info)
        self.world.barrier()
        memory = memory_for(sum(file.num_byte for file in [*files, *val]), config.cache_gb, self.device)
        pin = self.device.type == "cuda" and memory != self.device
        options = LoaderOptions(memory is not None, config.num_workers, pin, self.world.rank, self.world.size)
        crop = (config.ny_load, config.nx_load)
        augment = Augmentation(crop, info.num_class, info.is_partial, **config.group("augmentation"))
        data = PatchDataset(files, info, labelled=True, memory=memory, distances=weighted, margin=augment.margin)
        balance = info.class_share if config.balance else None
        weigh = partial(pixel_weight, class_share=balance, w0=config.w0, sigma=config.sigma) if weighted else None
        batch_size, seed, stride = config.batch_size, config.seed, state.net.stride
        shared = (config.num_crop, self.world.sum)
        return TrainingBatches(data, augment, batch_size, seed, options, self.device, stride, weigh, *shared)

    def _validation(self, info: DataInfo, files: list[SampleFile]) -> Validation | None:
        """What scores the validation set, if there is one."""
        config = self.config
        find_background(info, config.background)  # an unknown class is reported before the training
        self.best.check(info.num_class, has_validation=bool(files))
        if not files:
            return None
        checked_samples(files, info, labelled=True)
        options = (config.background, config.tta, config.tile)
        return Validation(files, self.device, self.precision, *options, self.world, self.progress)

    def _lock(self, locks: ExitStack) -> None:
        """Lock the checkpoint and log folders against other trainings."""
        if self.world.is_main:
            for folder in (self.dir_checkpoint, self.dir_log):
                locks.enter_context(locked(folder, "choose another --scope"))

    def _open_folders(self, state: TrainState) -> None:
        """Move files of an earlier run aside, write arg.txt, and print what will be trained."""
        check_writable(self.dir_checkpoint)
        epochs = checkpoint.list_epochs(self.dir_checkpoint)
        stale = [path for epoch, path in epochs.items() if epoch > state.saved_epoch] + self.best.stale()
        logs = [*self.dir_log.glob("events.out.tfevents*"), *self.dir_log.glob("arg.txt")]
        logs = [] if state.saved_epoch else logs
        for folder, files in ((self.dir_checkpoint, stale), (self.dir_log, logs)):
            if moved := move_aside(folder, files):
                say(f"moved the files of an earlier run to {moved}")
        write_arguments(self.dir_log / "arg.txt", self.config.as_typed() | {"network": state.net.arguments})
        say_what_is_trained(state.info, num_weight(state.net), self.device)

    def _log(self, state: TrainState) -> closing[TrainingLog] | nullcontext[NoLog]:
        """Log of the main process; the others write none."""
        if not self.world.is_main:
            return nullcontext(NoLog())
        progress = self.progress.fraction(state.epoch - 1)
        return closing(TrainingLog(self.dir_log, state.epoch, self.progress.last_epoch, progress))

    def _save(self, state: TrainState, *, whole: bool) -> Path:
        """Save the checkpoint of a complete or interrupted epoch."""
        path = checkpoint.path_of(self.dir_checkpoint, state.epoch)
        self.best.save(is_main=self.world.is_main)  # first: a numbered checkpoint says that it is there
        if self.world.is_main:
            state.checkpoint(self.config, whole=whole, seconds=self.progress.seconds).save(path)
        return path

    def _save_stopped(self, state: TrainState, validation: Validation | None) -> Path:
        """Save after a signal, choose the threshold for these weights, and save again; a second Ctrl-C skips that."""
        path = self._save(state, whole=False)
        if validation is not None and state.info.num_class == 2:
            if self.world.is_main:
                say(f"saved {path}; choosing its threshold, press Ctrl-C again to skip this", sys.stderr)
            score_segments = partial(validation.score_segments, stoppable=False)
            score_segments(state)
            self.best.choose_threshold(state, score_segments)
            self._save(state, whole=False)
        return path

    @contextmanager
    def _save_on_error(self, state: TrainState) -> Iterator[None]:
        """Save a trained epoch if its validation fails, for example for lack of memory."""
        try:
            yield
        except UserError:  # the training has diverged
            raise
        except Exception:
            self._say(f"saved {self._save(state, whole=False)}")
            raise

    def _say_stopped(self, state: TrainState, num_step: int, path: Path) -> int:
        """Print where a training was stopped and how to resume it; return the exit status."""
        newest = ["--epoch", "0"] if self.config.epoch else []
        again = command_line(newest if self.config.train_continue else ["--train_continue", "on"])
        where = f"epoch {state.epoch} after step {len(state.losses)} of {num_step}"
        if self.world.is_main:
            say(f"stopped in {where}, saved {path}; to resume: {again}", sys.stderr)
        return 128 + self.progress.signum

    def _say(self, text: str) -> None:
        """Print a line in the main process only."""
        if self.world.is_main:
            say(text)
