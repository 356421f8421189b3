"""Training: one loop over batches, and the Trainer around it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
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
from config import Config, find_network
from dataset import Batch, PatchDataset
from description import DataInfo, identity, load_info
from device import pick_precision
from distributed import World
from evaluation.hints import loss_hints
from evaluation.segment import checked_samples, have_foreground
from evaluation.tables import Scores
from evaluation.validation import Validation
from files import check_writable
from locks import locked
from prediction.predictor import find_background
from samples import ENTRIES, SampleFile, list_samples, list_unlabelled
from training.augment import Augmentation
from training.best import OF_FOREGROUND, BestEpoch
from training.budget import Budget
from training.compiled import maybe_compile
from training.consistency import consistency, has_teacher, ramped
from training.forecast import Forecast
from training.loader import TrainingBatches, fit_crop, memory_for
from training.log import Log, NoLog, TrainingLog, command_line
from training.losses import LOSSES, Loss, check_finite, cross_entropy
from training.optim import learning_rate
from training.sampler import BatchSettings
from training.saver import Saver
from training.state import NEW_TRAINING, TrainState, changed_flags, hyperparameters, num_weight
from training.transfer import start_from
from training.weight_map import cache_border_distances, loss_of, pixel_weight
from utils import FlagError, UserError, echo


def train_step(
    net: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    *,
    criterion: Loss = cross_entropy,
    clip: float = 0.0,
    precision: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    also: Callable[[Tensor, Batch], Tensor] | None = None,
) -> Tensor:
    """Update the weights of a network with a batch, and return its mean loss, without what is lost `also`.

    The loss stays on the device, so that nothing here waits for a GPU. The gradient norm is clipped to `clip`, unless
    that is 0; in mixed precision logits and loss are float32, and for float16 a scaler multiplies the loss.
    """
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    if "seed" in batch:
        torch.manual_seed(batch["seed"])  # for dropout
    mixed = torch.autocast(batch["input"].device.type, precision, enabled=precision is not None)
    with mixed:
        logits = net(batch["input"])
    loss = total = criterion(logits.float(), batch["label"], batch.get("weight")) * batch.get("loss_scale", 1)
    if also is not None:
        with mixed:
            total = loss + also(logits.float(), batch) * batch.get("loss_scale", 1)
    optimizer.zero_grad()
    scaler.scale(total).backward()
    if clip:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], clip)
    scaler.step(optimizer)
    scaler.update()
    return loss.detach()


class Trainer:
    """Builds the network, the data and the log of a run from the flags, and trains on a device."""

    def __init__(self, config: Config, device: torch.device, world: World | None = None) -> None:
        self.config, self.device, self.world = config, device, world or World()
        self.dir_data, self.dir_checkpoint, self.dir_log = map(config.folder, ("data", "checkpoint", "log"))
        self.precision = pick_precision(config.amp, self.device)
        self.budget = Budget(config.num_epoch, config.max_minutes, self.world)
        self.best = BestEpoch(config.best_score, config.patience, checkpoint.best_path(self.dir_checkpoint))
        self.saver = Saver(self.best, self.budget, self.world, begin_log=lambda: self.log.open())
        self.hints: list[str] = []  # about the losses in the end
        self.resumed: Path | None = None  # checkpoint that the training goes on from

    def train(self) -> int:
        """Train to the last epoch; return 0, or 128 plus the signal that stopped the training, which is saved."""
        if self.config.batch_size < self.world.size:
            what = f"--batch_size {self.config.batch_size}: {self.world.size} processes share a batch"
            raise FlagError(f"{what}: raise it to {self.world.size} or more, or start fewer")
        with ExitStack() as stack:
            if self.dir_checkpoint.is_dir():
                self._lock(stack)
            stack.enter_context(self.world.reading(self.dir_data, ENTRIES, "choose another --name_data"))
            state = self._first_state()
            if why := self._is_done(state):
                self._echo(f"{why}, or {NEW_TRAINING}")
                self._echo_next()
                return 0
            train = list_samples(self.dir_data / "train")
            val = list_samples(self.dir_data / "val") if any((self.dir_data / "val").glob("*.npy")) else []
            batches, validation = self._batches(state, train, val), self._validation(state.info, val)
            self._lock(stack)
            if why := state.note_batch_settings(batches.sampler.batch_settings, len(batches)):
                self._echo(f"note: epoch {state.epoch} starts again: {why}")
            self.log = stack.enter_context(self._log(state))
            stack.enter_context(self.budget.stop)
            stack.enter_context(self.saver.on_error(state))
            if self.resumed == self.best.path:  # the numbered checkpoint of its epoch is missing
                self.saver.save_meanwhile(state, epoch_complete=True)
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
        forecast = Forecast(num_step - len(state.losses), config, self.log.note)
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
                    self._read_losses(state, batches)
                    self.saver.save_meanwhile(state, epoch_complete=False)
                for group in state.optimizer.param_groups:
                    group["lr"] = learning_rate(fraction, config.lr, config.schedule, config.warmup)
                if "unchanged" in batch:
                    weight = ramped(config.consistency, fraction)
                    recipe["also"] = partial(consistency, teacher=state.averaged_net, weight=weight)
                state.steps.append(train_step(net, batch, state.optimizer, **recipe))
                forecast.note(state.steps[-1])
                self.log.show(state.epoch, fraction)
                if state.average:
                    state.average.update(state.net)
            torch.backends.cudnn.benchmark = False
            self._read_losses(state, batches)
            scores = self._training_scores(state, batches, first, time.perf_counter() - start)
            last = budget.sync(state.epoch) >= 1
            if validation and not budget.is_stopping():
                scores |= self._validate(state, validation, last)
                last = last or self.best.is_over(state, state.epoch)
                if self._is_save_due(state, last) and not budget.is_stopping():
                    self.best.choose_threshold(state, validation.score_segments)
            if budget.is_stopping():
                return
            with budget.stop.unless_read():
                self.log.scalars(state.epoch, scores, budget.fraction(state.epoch))
            if last:
                self.log.hparams(state.epoch, hyperparameters(config), scores)
                self.hints = loss_hints(scores) if "bce" in loss_of(config.loss, state.info.num_class) else []
                return
            if self._is_save_due(state, last):
                self.saver.save_meanwhile(state, epoch_complete=True)
            state.next_epoch()

    def _is_save_due(self, state: TrainState, last: bool) -> bool:
        """Whether a numbered checkpoint is written after the current epoch."""
        return last or state.epoch % self.config.num_freq_save == 0

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
        """Scores of the pixels of the validation set, and of its segments where they are due.

        Segments choose the threshold of the weights, and so they are scored for each numbered checkpoint.
        """
        config, epoch = self.config, state.epoch
        last = last or self.best.is_over(state, epoch)  # it is, unless this epoch is better
        pixels = validation.score_pixels(state, pictures=last or epoch == 1 or epoch % config.num_freq_disp == 0)
        if pixels is None:
            return {}
        for loss, file in zip(pixels.losses, validation.files, strict=True):
            check_finite(loss, f"the validation set after epoch {epoch}", [file])
        self.log.images(epoch, pixels.pictures or {})
        pixels.pictures = None  # three bytes per pixel that the next scores need themselves
        are_due = self._is_save_due(state, last) or epoch % config.num_freq_score == 0
        segments = validation.score_segments(state) if are_due else None
        if self.budget.is_stopping():
            return {}
        if segments:
            self.log.precision_recall(epoch, segments.counts)
        scores = pixels.scores(segments)
        self.best.consider(state, scores, self.budget.seconds)
        return scores

    def _first_state(self) -> TrainState:
        """State that the training goes on from: that of a checkpoint, or a new one where there is none."""
        config = self.config
        has_any = self.world.broadcast(bool(checkpoint.list_newest(self.dir_checkpoint)))
        if distributed.is_restarted() and has_any and (config.epoch or not config.train_continue):
            what = "torchrun has started this run again, and its flags would not resume its last checkpoint"
            raise UserError(f"{what}: use --train_continue on, without --epoch")
        resumes = config.train_continue and (has_any or config.epoch)
        state = self._resume(config.epoch) if resumes else self._begin()
        state.database = identity(self.dir_data)
        self.budget.seconds_before, self.saver.position = state.seconds, state.position
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
            values = info.class_values
            what = f"the labels have only one class, {values}" if values else "made with --label none"
            raise UserError(f"{self.dir_data}: {what}: nothing to learn: make it with other labels")
        state = TrainState.begin(self.config, info, self.device, self.precision)
        if self.config.init_from:
            self._echo(start_from(state, find_network(self.config.init_from)))
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
        notes = changed_flags(saved, self.config)
        if is_remade:
            what = f"{self.dir_data} was made again since epoch {saved.epoch}: its samples are used from here on"
            notes.insert(0, what)
            state.use_database(load_info(self.dir_data))
        for note in notes + self.best.resume(saved, state, is_remade=is_remade):
            self._echo(f"note: {note}")
        self._echo(f"resuming from {path}")
        self.config, self.resumed = state.config, path
        return state

    def _batches(self, state: TrainState, files: list[SampleFile], val: list[SampleFile]) -> TrainingBatches:
        """Batches of the training set, with pixel weights if the loss needs them."""
        config, info = self.config, state.info
        is_weighted = loss_of(config.loss, info.num_class) == "wbce"
        if not is_weighted and (flags := config.given("balance", "w0", "sigma")):
            raise FlagError(f"{flags}: applies to --loss wbce: give that, or leave it out")
        if is_weighted and self.world.is_main:
            cache_border_distances(files, info)
        self.world.barrier()
        unlabelled = self._unlabelled(state)
        is_partial, crop = info.is_partial or bool(unlabelled), (config.ny_load, config.nx_load)
        taught = has_teacher(config, is_partial=is_partial)
        augment = Augmentation(crop, info.num_class, is_partial, taught, **config.group("augmentation"))
        num_byte = sum(file.num_byte for file in [*files, *unlabelled, *val])
        memory, margin = memory_for(num_byte, config.cache_gb, self.device), augment.margin
        wanted: Any = {"labelled": True, "unlabelled": unlabelled, "distances": is_weighted}
        data = PatchDataset(files, info, memory=memory, margin=margin, **wanted)
        crop = fit_crop(augment.crop, data.shapes[: len(files)], state.net.stride, verbose=self.world.is_main)
        share = info.class_share if config.balance else None
        return TrainingBatches(
            data,
            replace(augment, crop=crop),
            BatchSettings(crop, config.batch_size, config.seed, config.num_crop),
            self.device,
            world=self.world,
            num_workers=config.num_workers,
            weigh=partial(pixel_weight, class_share=share, w0=config.w0, sigma=config.sigma) if is_weighted else None,
        )

    def _unlabelled(self, state: TrainState) -> list[SampleFile]:
        """Samples without a label, if anything learns from them: batch normalisation, or the teacher."""
        files = list_unlabelled(self.dir_data)
        if not files:
            return []
        num, norm = f"{len(files)} unlabelled image(s)", state.net.arguments["norm"]
        if norm != "bnorm" and not self.config.consistency:
            self._echo(f"note: {num} are not used: with --norm {norm} only --consistency learns from them")
            return []
        self._echo(f"{num}: every other crop is of one of them")
        return files

    def _validation(self, info: DataInfo, files: list[SampleFile]) -> Validation | None:
        """What scores the validation set, if there is one."""
        config = self.config
        background = find_background(info, config.background)  # an unknown class is reported before the training
        self.best.check(info.num_class, has_validation=bool(files))
        if not files:
            return None
        files = checked_samples(files, info, labelled=True)
        if config.best_score in OF_FOREGROUND and not have_foreground(files, info, background):
            self.best.is_blank = True
            score = f"--best_score {config.best_score}"
            what = f"warning: no validation sample has foreground, so no epoch can be the best by {score}"
            self._echo(f"{what}: choose another --best_score, or annotate more", sys.stderr)
        return Validation(
            files,
            device=self.device,
            precision=self.precision,
            background=config.background,
            tta=config.tta,
            tile=config.tile,
            world=self.world,
            budget=self.budget,
        )

    def _lock(self, stack: ExitStack) -> None:
        """Lock the checkpoint and log folders against other trainings."""
        if self.world.is_main:
            for folder in (self.dir_checkpoint, self.dir_log):
                stack.enter_context(locked(folder, "choose another --scope"))

    def _log(self, state: TrainState) -> AbstractContextManager[Log]:
        """Log of the main process, begun at once where no file of an earlier training is in the way."""
        if not self.world.is_main:
            return nullcontext(NoLog())
        for folder in (self.dir_checkpoint, self.dir_log):
            check_writable(folder)
        last = None if self.config.max_minutes else self.config.num_epoch
        log = TrainingLog(self.dir_log, state.epoch, last, self.budget.fraction(state.epoch - 1))
        log.arguments(state.epoch, self.config.as_typed(), state.net.arguments)
        shares = zip(state.info.class_names, state.info.class_share, strict=True)
        echo("training pixels: " + ", ".join(f"{name} {share:.1%}" for name, share in shares))
        echo(f"{num_weight(state.net):,} weights on {self.device}")
        if self.saver.find_stale(state, self.resumed, self.dir_log):
            what = "the files of an earlier training are moved aside"
            echo(f"note: {what} when the first checkpoint of this one is saved")
        else:
            log.open()
        return closing(log)

    def _end(self, state: TrainState, batches: TrainingBatches, validation: Validation | None) -> int:
        """Save and report the end of the training, or where a signal stopped it; return the exit status."""
        if self.budget.is_stopping():
            return self._stop(state, batches, validation)
        path = self.saver.save(state, epoch_complete=True)
        if validation and (text := validation.threshold_text(state)):
            self._echo(text)
        why, best = self.best.reason(state, state.epoch), self.best.describe(state)
        self._echo(f"trained to epoch {state.epoch}{why}, saved {path}{best}")
        for line in self.hints:
            self._echo(f"hint: {line}")
        self._echo_next()
        return 0

    def _stop(self, state: TrainState, batches: TrainingBatches, validation: Validation | None) -> int:
        """Save after a signal, and print how to resume; a second Ctrl-C skips the choice of the threshold."""
        status, where = 128 + self.budget.signum, f"stopped in epoch {state.epoch}"
        if state.position == self.saver.position:
            self._echo(f"{where} before its next step: no new checkpoint", sys.stderr)
            return status
        path = self.saver.save(state, epoch_complete=False)
        if validation is not None and state.info.num_class == 2:
            self._echo(f"saved {path}; choosing its threshold, press Ctrl-C again to skip this", sys.stderr)
            score_segments = partial(validation.score_segments, stoppable=False)
            score_segments(state)
            self.best.choose_threshold(state, score_segments)
            self.saver.save(state, epoch_complete=False)
        newest = ["--epoch", "0"] if self.config.epoch else []
        again = command_line(newest if self.config.train_continue else ["--train_continue", "on"])
        moved = self.saver.moved
        earlier = f"; the earlier training lies in {' and '.join(map(str, moved))}" if moved else ""
        where = f"{where} after step {len(state.losses)} of {len(batches)}"
        self._echo(f"{where}, saved {path}{earlier}; to resume: {again}", sys.stderr)
        return status

    def _echo_next(self) -> None:
        """Print the command to type next: the test, of the validation samples where there are no others."""
        splits = ("test", "val")
        first = next((split for split in splits if any((self.dir_data / split).glob("*.npy"))), splits[0])
        self._echo(self.config.next_step(Config, mode="test", **({} if first == splits[0] else {"split": first})))

    def _echo(self, text: str, stream: TextIO | None = None) -> None:
        """Print a line in the main process only."""
        if self.world.is_main:
            echo(text, stream)
