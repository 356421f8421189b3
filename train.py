"""Training: one loop over batches, and the Trainer around it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
import distributed
from checkpoint import Checkpoint, MismatchError
from config import Config
from dataset import Batch, PatchDataset
from description import DataInfo, identity, load_info
from device import pick_precision
from distributed import World
from evaluation.segment import checked_samples
from evaluation.tables import Scores
from evaluation.validation import Validation
from files import check_writable, discard, locked, move_aside
from prediction.predictor import find_background
from samples import ENTRIES, SampleFile, list_samples
from training.augment import Augmentation
from training.best import BestEpoch
from training.budget import Budget
from training.compiled import maybe_compile
from training.loader import LoaderOptions, TrainingBatches, memory_for
from training.log import NoLog, TrainingLog, command_line, say_what_is_trained
from training.losses import LOSSES, Loss, check_finite, cross_entropy
from training.optim import learning_rate
from training.state import (
    NEW_TRAINING,
    TrainState,
    changed_flags,
    hyperparameters,
    kept_architecture,
    num_weight,
)
from training.transfer import start_from
from training.weight_map import cache_border_distances, loss_of, pixel_weight
from utils import DivergenceError, FlagError, UserError, echo


def train_step(
    net: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    *,
    criterion: Loss = cross_entropy,
    clip: float = 0.0,
    precision: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Update the weights of a network with a batch.

    Parameters
    ----------
    net : nn.Module
        (N, C, H, W) to logits (N, K, H, W).
    batch : dict
        On the device of the network.
    optimizer : Optimizer
        Of the network's weights.
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
    Tensor
        Mean loss of the batch, still on the device, so that nothing here waits for a GPU.
    """
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    if "seed" in batch:
        torch.manual_seed(batch["seed"])  # for dropout
    with torch.autocast(batch["input"].device.type, precision, enabled=precision is not None):
        logits = net(batch["input"])
    loss = criterion(logits.float(), batch["label"], batch.get("weight")) * batch.get("loss_scale", 1)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    if clip:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], clip)
    scaler.step(optimizer)
    scaler.update()
    return loss.detach()


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
        self.budget = Budget(config.num_epoch, config.max_minutes, self.world)
        self.best = BestEpoch(config.best_score, config.patience, self.dir_checkpoint)
        self.resumed: Path | None = None  # checkpoint that the training goes on from
        self.stale: dict[Path, list[Path]] = {}  # files of an earlier training that are in the way, by their folder
        self.moved: list[Path] = []  # folders that they were moved to

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
            if self.dir_checkpoint.is_dir():
                self._lock(locks)
            locks.enter_context(self.world.reading(self.dir_data, ENTRIES, "choose another --name_data"))
            state = self._first_state()
            if why := self._is_done(state):
                self._echo(f"{why}, or {NEW_TRAINING}")
                return 0
            train = list_samples(self.dir_data / "train")
            val = list_samples(self.dir_data / "val") if any((self.dir_data / "val").glob("*.npy")) else []
            batches, validation = self._batches(state, train, val), self._validation(state.info, val)
            self._lock(locks)
            if why := state.note_batch_settings(batches.batch_settings, len(batches)):
                self._echo(f"note: epoch {state.epoch} starts again: {why}")
            with self._log(state) as self.log, self.budget.stop, self._save_on_error(state):
                if self.resumed == checkpoint.best_path(
                    self.dir_checkpoint
                ):  # the numbered one of its epoch is missing
                    self._save_numbered(state)
                self._train(state, batches, validation)
                return self._end(state, batches, validation)

    def _train(self, state: TrainState, batches: TrainingBatches, validation: Validation | None) -> None:
        """Train epoch by epoch: to the last one, to one that ends the patience, or to a signal."""
        config, budget, epoch_steps = self.config, self.budget, len(batches)
        net = self.world.wrap(state.net)
        num_step = epoch_steps * (config.num_epoch - state.epoch + 1)
        net = maybe_compile(net, config.compile, self.device, num_step, config.max_minutes)
        criterion = LOSSES[loss_of(config.loss, state.info.num_class)]
        recipe: Any = {"criterion": criterion, "clip": config.clip, "precision": self.precision, "scaler": state.scaler}
        last = False
        while not last:
            net.train()
            torch.backends.cudnn.benchmark = True  # crops are of one size; whole images, between epochs, are not
            start, first = time.perf_counter(), len(state.losses)
            for step, batch in enumerate(batches.of(state.epoch, first), first):
                fraction = budget.sync(state.epoch - 1 + step / epoch_steps)  # of the whole training
                if budget.is_stopping() or (fraction >= 1 and step > first):
                    break
                if budget.is_save_due:
                    self._save_latest(state, batches)
                for group in state.optimizer.param_groups:
                    group["lr"] = learning_rate(fraction, config.lr, config.schedule, config.warmup)
                state.steps.append(train_step(net, batch, state.optimizer, **recipe))
                if state.average:
                    state.average.update(state.net)
            torch.backends.cudnn.benchmark = False
            self._read_losses(state, batches)
            scores = self._training_scores(state, batches, first, time.perf_counter() - start)
            last = budget.sync(state.epoch) >= 1
            if validation and not budget.is_stopping():
                scores |= self._validate(state, validation, last)
                last = last or self.best.is_over(state, state.epoch)
            if budget.is_stopping():
                return
            with budget.stop.unless_read():
                self.log.scalars(state.epoch, scores, budget.fraction(state.epoch))
            if last:
                self.log.hparams(state.epoch, hyperparameters(config), scores)
                return
            if state.epoch % config.num_freq_save == 0:
                self._save_numbered(state)
            state.next_epoch()

    def _read_losses(self, state: TrainState, batches: TrainingBatches) -> None:
        """Read the losses of the steps: the only wait for the device; one that is not finite ends the training."""
        if state.steps:
            state.losses += (self.world.sum(torch.stack(state.steps)) / self.world.size).tolist()
            state.steps.clear()
        done = batches.files_of(state.epoch)[: len(state.losses)]
        for step, (loss, files) in enumerate(zip(state.losses, done, strict=True), 1):
            check_finite(loss, f"epoch {state.epoch}, step {step}", files)

    def _training_scores(self, state: TrainState, batches: TrainingBatches, first: int, seconds: float) -> Scores:
        """Mean loss of an epoch over its images, its last learning rate, and the speed of its steps from the first."""
        sizes = [len(files) for files in batches.files_of(state.epoch)[: len(state.losses)]]
        return {
            "loss/train": float(np.average(state.losses, weights=sizes)) if sizes else 0.0,
            "learning_rate": state.optimizer.param_groups[0]["lr"],
            "images_per_second": sum(sizes[first:]) / seconds,
        }

    def _validate(self, state: TrainState, validation: Validation, last: bool) -> Scores:
        """Scores on the validation set, with those of segments when they are due; the best epoch is kept."""
        config, epoch = self.config, state.epoch
        last = last or self.best.is_over(state, epoch)  # it is, unless this epoch is better
        saved = last or epoch % config.num_freq_save == 0
        scorer = validation.score_pixels(state, pictures=last or epoch == 1 or epoch % config.num_freq_disp == 0)
        if scorer is None:
            return {}
        for loss, file in zip(scorer.losses, validation.files, strict=True):
            check_finite(loss, f"the validation set after epoch {epoch}", [file])
        self.log.images(epoch, scorer.pictures or {})
        scorer.pictures = None  # three bytes per pixel that the next scores need themselves
        challenge = validation.score_segments(state) if saved or epoch % config.num_freq_score == 0 else None
        if self.budget.is_stopping():
            return {}
        if challenge:
            self.log.precision_recall(epoch, challenge.counts)
        scores = scorer.scores(challenge)
        take = partial(state.checkpoint, config, epoch_complete=True, seconds=self.budget.seconds)
        self.best.update(state, scores, take, has_threshold=bool(challenge) or state.info.num_class > 2)
        if saved:
            self.best.choose_threshold(state, validation.score_segments)
        return scores

    def _first_state(self) -> TrainState:
        """State that the training goes on from: that of a checkpoint, or a new one where there is none."""
        config, restarted = self.config, self._was_restarted()
        has_any = self.world.broadcast(bool(checkpoint.list_newest(self.dir_checkpoint)))
        if restarted or (config.train_continue and (has_any or config.epoch)):
            state = self._resume(0 if restarted else config.epoch)
        else:
            state = self._begin()
        state.database = identity(self.dir_data)
        self.budget.seconds_before, self.saved_position = state.seconds, state.position
        return state

    def _is_done(self, state: TrainState) -> str:
        """Why there is nothing left to train; empty if there is."""
        if self.budget.sync(state.epoch - 1) >= 1:
            return f"already trained to epoch {state.epoch - 1}: raise --num_epoch or --max_minutes to train longer"
        if state.epoch > state.saved_epoch and self.best.is_over(state, state.saved_epoch):
            why = self.best.reason(state, state.saved_epoch)
            return f"trained to epoch {state.saved_epoch} already{why}: raise --patience to resume"
        return ""

    def _begin(self) -> TrainState:
        """State of a new training."""
        info = replace(load_info(self.dir_data), normalize=self.config.normalize)
        if info.num_class < 2:
            found = info.class_values
            what = f"the labels have only one class, {found}" if found else "made with --label none"
            raise UserError(f"{self.dir_data}: {what}: nothing to learn: make it with other labels")
        state = TrainState.begin(self.config, info, self.device, self.precision)
        if self.config.init_from:
            self._echo(start_from(state, Path(self.config.init_from)))
        return state

    def _resume(self, epoch: int | str) -> TrainState:
        """State from the checkpoint of an epoch; 0: the newest."""
        load = partial(Checkpoint.load_for, database=self.dir_data, note=self._echo)
        try:
            path, saved = checkpoint.load_epoch(self.dir_checkpoint, epoch, load, self._echo)
        except MismatchError as error:
            raise UserError(f"{error}, or {NEW_TRAINING}") from error
        state = TrainState.resume(saved, path, self.config, self.device, self.precision)
        is_remade = bool(saved.database) and saved.database != identity(self.dir_data)
        if is_remade:
            self._echo(
                f"note: {self.dir_data} was made again since epoch {saved.epoch}: its samples are used from here on"
            )
            state.use_database(load_info(self.dir_data))
        notes = changed_flags(saved, self.config) + self.best.resume(saved, state, self.world, is_remade=is_remade)
        for note in notes:
            self._echo(f"note: {note}")
        self.config = replace(self.config, **kept_architecture(saved, self.config))
        self.resumed = path
        self._echo(f"resuming from {path}")
        return state

    def _was_restarted(self) -> bool:
        """Whether torchrun has restarted this run after it had saved a checkpoint."""
        own = False
        if self.world.is_main and distributed.restarts() and checkpoint.list_newest(self.dir_checkpoint):
            own = checkpoint.load_epoch(self.dir_checkpoint)[1].run == distributed.run_id()
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
        return Validation(files, self.device, self.precision, *options, self.world, self.budget)

    def _lock(self, locks: ExitStack) -> None:
        """Lock the checkpoint and log folders against other trainings."""
        if self.world.is_main:
            for folder in (self.dir_checkpoint, self.dir_log):
                locks.enter_context(locked(folder, "choose another --scope"))

    def _log(self, state: TrainState) -> closing[TrainingLog] | nullcontext[NoLog]:
        """Log of the main process, begun at once where no file of an earlier training is in the way."""
        if not self.world.is_main:
            return nullcontext(NoLog())
        for folder in (self.dir_checkpoint, self.dir_log):
            check_writable(folder)
        self.stale = self._stale_files(state)
        log = TrainingLog(self.dir_log, state.epoch, self.budget.last_epoch, self.budget.fraction(state.epoch - 1))
        log.arguments(state.epoch, self.config.as_typed(), state.net.arguments)
        say_what_is_trained(state.info, num_weight(state.net), self.device)
        if any(self.stale.values()):
            echo(
                "note: the files of an earlier training are moved aside when the first checkpoint of this one is saved"
            )
        else:
            log.open()
        return closing(log)

    def _stale_files(self, state: TrainState) -> dict[Path, list[Path]]:
        """Files of an earlier training, by their folder: later checkpoints, another best one, and logs."""
        epochs = checkpoint.list_epochs(self.dir_checkpoint)
        stale = [path for epoch, path in epochs.items() if epoch > state.saved_epoch]
        latest, best = checkpoint.latest_path(self.dir_checkpoint), self.best.path
        stale += [latest] if latest.is_file() and latest != self.resumed else []
        stale += [best] if best.is_file() and not self.best.is_resumed and best != self.resumed else []
        logs = [*self.dir_log.glob("events.out.tfevents*"), *self.dir_log.glob("arg.txt")]
        return {self.dir_checkpoint: stale, self.dir_log: [] if state.saved_epoch else logs}

    def _make_room(self) -> None:
        """Move the files of an earlier training aside: called before a checkpoint of this one gets its name."""
        if any(self.stale.values()):
            moved = [move_aside(folder, files) for folder, files in self.stale.items()]
            self.moved, self.stale = [folder for folder in moved if folder], {}
            echo(f"moved the files of an earlier training to {' and '.join(map(str, self.moved))}")
            self.log.open()

    def _save(self, state: TrainState, saved: Checkpoint, path: Path) -> None:
        """Write a checkpoint, and that of the best epoch before, since a later one says that it is there."""
        self.best.save(self._make_room, is_main=self.world.is_main)
        if self.world.is_main:
            saved.save(path, self._make_room)
        self.saved_position = state.position
        self.budget.note_save()

    def _save_last(self, state: TrainState, *, epoch_complete: bool) -> Path:
        """Save the checkpoint of a complete or interrupted epoch under its number."""
        saved = state.checkpoint(self.config, epoch_complete=epoch_complete, seconds=self.budget.seconds)
        path = checkpoint.path_of(self.dir_checkpoint, saved.epoch)
        self._save(state, saved, path)
        if self.world.is_main:
            discard(checkpoint.latest_path(self.dir_checkpoint))
        return path

    def _save_numbered(self, state: TrainState) -> None:
        """Save a complete epoch, with others to come."""
        with self._go_on():
            self._save_last(state, epoch_complete=True)

    def _save_latest(self, state: TrainState, batches: TrainingBatches) -> None:
        """Save within an epoch, in the file that is replaced by the next one."""
        self._read_losses(state, batches)
        saved = state.checkpoint(self.config, epoch_complete=False, seconds=self.budget.seconds)
        with self._go_on():
            self._save(state, saved, checkpoint.latest_path(self.dir_checkpoint))

    @contextmanager
    def _go_on(self) -> Iterator[None]:
        """Train on if a checkpoint can't be written, with a warning: there may be room when the next one is due."""
        try:
            yield
        except UserError as error:
            self.budget.note_save()
            echo(f"warning: {error}; the training goes on, and tries again in ten minutes", sys.stderr)

    @contextmanager
    def _save_on_error(self, state: TrainState) -> Iterator[None]:
        """Save what is trained if anything but a diverged loss ends the training: a lost sample, a lack of memory."""
        try:
            yield
        except DivergenceError:
            raise
        except Exception:
            if state.position != self.saved_position:
                state.losses += torch.stack(state.steps).tolist() if state.steps else []  # others may be gone
                state.steps.clear()
                if np.isfinite(state.losses).all():
                    self._echo(f"saved {self._save_last(state, epoch_complete=False)}")
            raise

    def _end(self, state: TrainState, batches: TrainingBatches, validation: Validation | None) -> int:
        """Save and report the end of the training, or where a signal stopped it; return the exit status."""
        if self.budget.is_stopping():
            return self._stop(state, batches, validation)
        path = self._save_last(state, epoch_complete=True)
        why, best = self.best.reason(state, state.epoch), self.best.describe(state)
        self._echo(f"trained to epoch {state.epoch}{why}, saved {path}{best}")
        return 0

    def _stop(self, state: TrainState, batches: TrainingBatches, validation: Validation | None) -> int:
        """Save after a signal, and print how to resume; a second Ctrl-C skips the choice of the threshold."""
        status, where = 128 + self.budget.signum, f"stopped in epoch {state.epoch}"
        if state.position == self.saved_position:
            self._echo(f"{where} before its next step: no new checkpoint", sys.stderr)
            return status
        path = self._save_last(state, epoch_complete=False)
        if validation is not None and state.info.num_class == 2:
            self._echo(f"saved {path}; choosing its threshold, press Ctrl-C again to skip this", sys.stderr)
            score_segments = partial(validation.score_segments, stoppable=False)
            score_segments(state)
            self.best.choose_threshold(state, score_segments)
            self._save_last(state, epoch_complete=False)
        newest = ["--epoch", "0"] if self.config.epoch else []
        again = command_line(newest if self.config.train_continue else ["--train_continue", "on"])
        earlier = f"; the earlier training lies in {' and '.join(map(str, self.moved))}" if self.moved else ""
        where = f"{where} after step {len(state.losses)} of {len(batches)}"
        self._echo(f"{where}, saved {path}{earlier}; to resume: {again}", sys.stderr)
        return status

    def _echo(self, text: str, stream: TextIO | None = None) -> None:
        """Print a line in the main process only."""
        if self.world.is_main:
            echo(text, stream)
