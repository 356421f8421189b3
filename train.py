"""Training and testing: one loop over batches, and the Trainer that sets it up."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
import distributed
from config import Config, as_typed
from dataset import ENTRIES, DataInfo, SampleFile, find_description, list_samples, load_info
from distributed import World
from evaluation import page
from evaluation.page import Scores
from evaluation.scorers import Challenge, Segmented, SegmentScorer, TestScorer, ValidationScorer, open_sample, segment
from files import atomic_folder, check_writable, finish_exchange, locked, move_aside, reading
from legacy import convert_legacy
from model import NUM_LEVEL, UNet, init_weights, memory_format
from prediction.predictor import Predictor, find_background, fold_norm, predictor_of
from training.augment import Augmentation
from training.compiled import Compiled, settle
from training.loader import LoaderOptions, TrainingBatches
from training.log import NoLog, TrainingLog, command_line, write_arguments
from training.losses import LOSSES, Loss, cross_entropy
from training.optim import OPTIMS, MovingAverage, compatible_state, learning_rate, load_optimizer_state
from training.patches import Batch, PatchDataset
from training.weight_map import cache_border_distances, default_loss, pixel_weight
from utils import FlagError, StopRequest, UserError, pick_precision, say

Observer = Callable[[Batch, Tensor, Tensor], None]  # gets a batch, its logits and its loss

# may well change on a resume
PER_RUN = {"mode", "normalize", "train_continue", "epoch", "num_epoch", "max_minutes", "gpu_ids"}
FEW, ENOUGH = 1000, 1800  # steps of a training; see "Few annotated sections" in benchmarks/README.md


def run_epoch(
    net: nn.Module,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer | None = None,
    observe: Observer | None = None,
    *,
    criterion: Loss = cross_entropy,
    clip: float = 0.0,
    precision: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> list[Tensor]:
    """Go once through batches; train if and only if there is an optimiser.

    Parameters
    ----------
    net : nn.Module
        (N, C, H, W) to logits (N, K, H, W).
    batches : iterable of dict
        On the device of the network; the loss of one without a label is NaN.
    optimizer : Optimizer, optional
        Steps once a batch.
    observe : callable, optional
        Gets each batch, its logits and its loss.
    criterion : callable
        Loss of logits, label, and the batch's `weight` if there is one.
    clip : float
        Largest norm of the gradient; 0 for any.
    precision : torch.dtype, optional
        Of the network's arithmetic, see `pick_precision`; logits and loss are float32.
    scaler : GradScaler, optional
        Of the loss, for float16.

    Returns
    -------
    list of Tensor
        Mean loss of each batch, still on the device: nothing here waits for it.
    """
    net.train(optimizer is not None)
    torch.backends.cudnn.benchmark = optimizer is not None  # crops are of one size, whole images are not
    losses = []
    with torch.set_grad_enabled(optimizer is not None):
        for batch in batches:
            if "seed" in batch:
                torch.manual_seed(batch["seed"])  # for dropout
            with torch.autocast(batch["input"].device.type, precision, enabled=precision is not None):
                logits = net(batch["input"])
            logits = logits.float()
            if "label" in batch:
                loss = criterion(logits, batch["label"], batch.get("weight")) * batch.get("loss_scale", 1)
            else:
                loss = logits.new_tensor(torch.nan)
            if optimizer is not None:
                _step(optimizer, loss, clip, scaler or torch.amp.GradScaler(enabled=False))
            losses.append(loss.detach())
            if observe is not None:
                observe(batch, logits, losses[-1])
    return losses


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, clip: float, scaler: torch.amp.GradScaler) -> None:
    """Change the weights after a batch."""
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    if clip:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], clip)
    scaler.step(optimizer)
    scaler.update()


@dataclass
class TrainState:
    """Where a training stands.

    Attributes
    ----------
    net, optimizer
        With their weights and moments.
    scaler : GradScaler
        Of the loss; only float16 needs it, otherwise it does nothing.
    info : DataInfo
        Of the data that the network was first trained on.
    epoch : int
        The epoch in work, from 1.
    losses : list of float
        Loss of each batch of that epoch so far.
    plan : dict
        What the batches of that epoch depend on, as `PatchSampler.plan`.
    saved_epoch : int
        Epoch of the checkpoint it was loaded from; 0 for none.
    average : MovingAverage or None
        Of the weights, if there is one.
    threshold : float
        Probability of class 1 over which the validation scored best.
    seconds : float
        Time trained before this process.
    """

    net: UNet
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    info: DataInfo
    epoch: int = 1
    losses: list[float] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)
    saved_epoch: int = 0
    average: MovingAverage | None = None
    threshold: float = 0.5
    seconds: float = 0.0

    @property
    def best_net(self) -> nn.Module:
        """The network to validate and test with: the average, if there is one."""
        return self.average.net if self.average else self.net


class Trainer:
    """Sets up the data, the network and the log of a run, and trains or tests.

    Parameters
    ----------
    config : Config
        The flags.
    device : torch.device
        What to compute on.
    world : World, optional
        The processes that share the work; default: this one alone.
    """

    def __init__(self, config: Config, device: torch.device, world: World | None = None) -> None:
        self.config, self.device, self.world = config, device, world or World()
        self.dir_data = Path(config.dir_data) / config.name_data
        self.dir_checkpoint, self.dir_log, self.dir_result = (
            Path(folder) / config.scope / config.name_data
            for folder in (config.dir_checkpoint, config.dir_log, config.dir_result)
        )
        self.precision = pick_precision(config.amp, self.device)
        self.stop, self.stopping = StopRequest(), 0  # the second is what all processes know of
        self.start = time.monotonic()

    def train(self) -> int:
        """Train to the last epoch.

        Returns
        -------
        int
            Exit status: 0, or 128 and the number of the signal that stopped it, with the state saved.

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
        """Train while nobody else writes in the folders of the run, or replaces the samples that it reads."""
        if self.dir_checkpoint.is_dir():
            self._lock(locks)
        locks.enter_context(self._reading_database())
        state = self._resume() if self.config.train_continue or self._was_restarted() else self._begin()
        progress = self._agree(state, state.epoch - 1)
        if progress >= 1:
            self._say(f"trained to epoch {state.epoch - 1} already: raise --num_epoch or --max_minutes to go on")
            return 0
        train, val = self._loaders(state.info)
        self._lock(locks)
        self._plan(state, train)
        return self._epochs(state, progress, train, val)

    def _epochs(self, state: TrainState, progress: float, train: TrainingBatches, val: list[SampleFile] | None) -> int:
        """Train epoch after epoch."""
        nets = Compiled(self.world.wrap(state.net), settle(self.config.compile, self.device))
        if self.world.is_main:
            self._open_folders(state, len(train))
        with self._log(state, progress) as log, self.stop:
            last = False
            while not (last or self.stopping):
                scores = self._train_epoch(state, nets.choose(self._seconds_left(state, progress)), train)
                nets.measured(*self.world.max(scores["images_per_second"]))
                last = self._agree(state, state.epoch) >= 1
                if val is not None and not self.stopping:
                    with self._saved_after_an_error(state):
                        scores |= self._validate(state, val, log, last)
                if not self.stopping:
                    with self.stop.unless_read():
                        log.scalars(state.epoch, scores, self._progress(state, state.epoch))
                if self.stopping or last or state.epoch % self.config.num_freq_save == 0:
                    path = self._save(state, whole=not self.stopping)
                if self.stopping and val is not None:
                    self._save_threshold(state, val, path)
                if not self.stopping:
                    state.epoch, state.losses = state.epoch + 1, []
        if self.stopping:
            return self._say_stopped(state, len(train), path)
        self._say(f"trained to epoch {state.epoch - 1}, saved {path}")
        return 0

    def _was_restarted(self) -> bool:
        """Whether torchrun started this run again after it had saved a checkpoint."""
        own = False
        if self.world.is_main and distributed.restarts() and checkpoint.list_epochs(self.dir_checkpoint):
            own = checkpoint.load(checkpoint.find(self.dir_checkpoint, 0)).get("run") == distributed.run_id()
        return self.world.broadcast(own)

    def _lock(self, locks: ExitStack) -> None:
        """Keep other trainings out of the folders of this one."""
        if self.world.is_main:
            for folder in (self.dir_checkpoint, self.dir_log):
                locks.enter_context(locked(folder, "choose another --scope"))

    @contextmanager
    def _reading_database(self) -> Iterator[None]:
        """While entered, the database is whole and not replaced."""
        if self.world.is_main:
            finish_exchange(self.dir_data, ENTRIES)
        self.world.barrier()  # wait for it
        with reading(self.dir_data, ENTRIES, "choose another --name_data"):
            yield

    def _plan(self, state: TrainState, batches: TrainingBatches) -> None:
        """Begin an interrupted epoch again whose batches would be others now."""
        plan = batches.plan
        same = plan | state.plan
        changed = [f"{name} is {plan[name]}, was {same[name]}" for name in plan if same[name] != plan[name]]
        if state.losses and (changed or len(state.losses) > len(batches)):
            self._say(f"note: epoch {state.epoch} begins again: {', '.join(changed) or 'fewer samples'}")
            state.losses = []
        state.plan = plan

    @contextmanager
    def _saved_after_an_error(self, state: TrainState) -> Iterator[None]:
        """Save an epoch that is trained when what comes after it fails, as for want of memory."""
        try:
            yield
        except UserError:  # the training has broken down
            raise
        except Exception:
            self._say(f"saved {self._save(state, whole=False)}")
            raise

    def _say(self, text: str) -> None:
        """Print a line, once for all processes."""
        if self.world.is_main:
            say(text)

    def _log(self, state: TrainState, progress: float) -> TrainingLog | nullcontext:
        """Log of the first process; the others have none."""
        if not self.world.is_main:
            return nullcontext(NoLog())
        last = None if self.config.max_minutes else self.config.num_epoch
        return closing(TrainingLog(self.dir_log, state.epoch, last, progress))

    def _agree(self, state: TrainState, epochs: float) -> float:
        """Progress after so many epochs, and whether to stop: the same in all processes."""
        if self.world.is_left_alone and not self.stop:
            self.stop.signum = signal.SIGTERM
        signum, progress = self.world.max(self.stop.signum, self._progress(state, epochs))
        self.stopping = int(signum)
        return progress

    def _progress(self, state: TrainState, epochs: float) -> float:
        """Share of the run that is over when so many epochs are, or by the clock; in [0, 1]."""
        if self.config.max_minutes:
            return min(self._seconds(state) / (60 * self.config.max_minutes), 1.0)
        return min(epochs / self.config.num_epoch, 1.0)

    def _seconds(self, state: TrainState) -> float:
        """Time trained so far, that of the runs before included [s]."""
        return state.seconds + time.monotonic() - self.start

    def _seconds_left(self, state: TrainState, first: float) -> float:
        """Time that the rest takes [s], if it goes on as since `first`, the progress of this process at its start."""
        done = self._progress(state, state.epoch - 1)
        return self.world.max((time.monotonic() - self.start) * (1 - done) / max(done - first, 1e-9))[0]

    def _begin(self) -> TrainState:
        """First state, shaped after the data."""
        config, info = self.config, replace(load_info(self.dir_data), normalize=self.config.normalize)
        if info.num_class < 2:
            raise UserError(f"{self.dir_data}: the labels hold one class only, {info.class_values}: nothing to learn")
        if config.nch_in not in (0, info.nch_in):
            raise UserError(f"--nch_in {config.nch_in}: the images in {self.dir_data} have {info.nch_in} channels")
        allowed = (1, 2) if info.num_class == 2 else (info.num_class,)
        if config.nch_out not in (0, *allowed):
            raise UserError(
                f"--nch_out {config.nch_out}: {info.num_class} classes need {' or '.join(map(str, allowed))}"
            )
        channels, shape = (info.nch_in, config.nch_out or allowed[0]), (config.nch_ker, config.norm, config.pool)
        net = UNet(*channels, *shape, config.dropout, config.num_level)
        init_weights(net, config.init, config.seed)
        net.to(self.device, memory_format=memory_format(config.norm, self.precision))
        return TrainState(net, self._optimizer(net), self._scaler(), info, average=self._average(net))

    def _resume(self) -> TrainState:
        """State of a checkpoint; the flags of this run hold for all but the architecture."""
        config, path = self.config, checkpoint.find(self.dir_checkpoint, self.config.epoch)
        saved = self._load(path)
        for name, value in ({"num_level": NUM_LEVEL} | saved["arch"]).items():
            if getattr(config, name) not in (0, value):
                raise UserError(f"--{name} {getattr(config, name)}: {path} was trained with --{name} {value}")
        for name, value in saved["config"].items():
            if name not in PER_RUN and not name.startswith("dir_") and getattr(config, name, value) != value:
                self._say(f"note: --{name} is {getattr(config, name)}, was {value}")
        if config.normalize != saved["data"]["normalize"]:
            self._say(f"note: --normalize stays {saved['data']['normalize']}, as {path} was trained")
        net = self._network(saved, saved["net"], self.precision)
        with checkpoint.explain_mismatch(path):
            average, optimizer = self._average(net), self._optimizer(net)
            if average and saved.get("average"):
                average.load_state_dict(saved["average"])
            if compatible_state(saved["config"]["optim"], config.optim):
                load_optimizer_state(optimizer, saved["optim"])
            scaler = self._scaler()
            if scaler.is_enabled() and saved.get("scaler"):
                scaler.load_state_dict(saved["scaler"])
        self._say(f"resuming from {path}")
        epoch, losses = (saved["epoch"] + 1, []) if saved["whole"] else (saved["epoch"], saved["losses"])
        kept = {name: saved[name] for name in ("threshold", "seconds") if name in saved}
        older = {name: saved["config"].get(name) for name in ("batch_size", "seed")}  # before there was a plan
        kept |= {"losses": losses, "plan": saved.get("plan", older), "average": average}
        return TrainState(net, optimizer, scaler, DataInfo(**saved["data"]), epoch, saved_epoch=saved["epoch"], **kept)

    def _load(self, path: Path) -> dict[str, Any]:
        """Checkpoint in our layout, checked against the database."""
        saved = checkpoint.load(path)
        if "netG" in saved:  # pytorch-UNET's, with no description inside
            info = load_info(self.dir_data)
            with checkpoint.explain_mismatch(path):
                ours = convert_legacy(saved)
                info = checkpoint.legacy_info(ours["arch"], info)
                return ours | {"epoch": checkpoint.epoch_of(path), "data": asdict(info)}
        info = DataInfo.from_dict(saved["data"], path)
        here = load_info(self.dir_data) if find_description(self.dir_data) else info
        for what in ("nch_in", "class_values"):
            if getattr(here, what) != getattr(info, what):
                ours, theirs = getattr(here, what), getattr(info, what)
                raise UserError(
                    f"{self.dir_data}: {what} {ours}, but {path} was trained with {theirs}: use its database"
                )
        return saved

    def _network(self, saved: dict[str, Any], weights: dict[str, Tensor], precision: torch.dtype | None) -> UNet:
        """Network of a checkpoint with some of its weights, on the device, for computing in some type."""
        net = UNet(**saved["arch"], dropout=self.config.dropout)
        net.load_state_dict(weights)
        return net.to(self.device, memory_format=memory_format(net.arguments["norm"], precision))

    def _average(self, net: nn.Module) -> MovingAverage | None:
        return MovingAverage(net, self.config.average) if self.config.average else None

    def _optimizer(self, net: nn.Module) -> torch.optim.Optimizer:
        return OPTIMS[self.config.optim](net.parameters(), self.config.lr, self.config.beta1)

    def _scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.precision is torch.float16)

    def _loaders(self, info: DataInfo) -> tuple[TrainingBatches, list[SampleFile] | None]:
        """Batches of the training split and, if there is a validation split, its samples."""
        config = self.config
        find_background(info, config.background)  # a class that is not there is said before the training
        splits = ["train", "val"] if (self.dir_data / "val").is_dir() else ["train"]
        files = {split: list_samples(self.dir_data / split) for split in splits}
        weighted = self._loss(info) == "wbce"
        if weighted and self.world.is_main:
            cache_border_distances(files["train"], info)
        self.world.barrier()  # wait for them
        memory = self._memory(sum(file.num_byte for part in files.values() for file in part))
        reading, options = self._reading(memory), {"labelled": True, "memory": memory}
        augment = self._augmentation(info)
        data = PatchDataset(files["train"], info, **options, distances=weighted, margin=augment.margin)
        balance = info.class_share if config.balance else None
        weigh = partial(pixel_weight, class_share=balance, w0=config.w0, sigma=config.sigma) if weighted else None
        train = TrainingBatches(data, augment, config.batch_size, config.seed, reading, self.device, weigh)
        return train, self._checked(files["val"], info, labelled=True) if "val" in files else None

    def _checked(self, files: list[SampleFile], info: DataInfo, *, labelled: bool) -> list[SampleFile]:
        """Samples that are segmented whole, after a look into each."""
        PatchDataset(files, info, labelled=labelled)
        for file in files:
            open_sample(file, info)
        return files

    def _memory(self, num_byte: int) -> torch.device | None:
        """Where a database of this size is kept: with the network, if its GPU has ample room; None: on the disk."""
        if num_byte > self.config.cache_gb * 1e9:
            return None
        ample = self.device.type == "cpu" or 8 * num_byte < torch.cuda.mem_get_info(self.device)[0]
        return self.device if ample else torch.device("cpu")

    def _reading(self, memory: torch.device | None) -> LoaderOptions:
        """How this process reads samples that are kept there."""
        pin = self.device.type == "cuda" and memory != self.device
        return LoaderOptions(memory is not None, self.config.num_workers, pin, self.world.rank, self.world.size)

    def _loss(self, info: DataInfo) -> str:
        """Loss that the flag or the classes choose."""
        return default_loss(info.num_class) if self.config.loss == "auto" else self.config.loss

    def _augmentation(self, info: DataInfo) -> Augmentation:
        c = self.config
        names = ("flip", "turn", "elastic", "elastic_share", "elastic_grid")
        names += ("brightness", "contrast", "gamma", "blur", "noise")
        return Augmentation((c.ny_load, c.nx_load), info.num_class, **{name: getattr(c, name) for name in names})

    def _open_folders(self, state: TrainState, num_step: int) -> None:
        """Set aside what an earlier run would mix in, write arg.txt, and say what is about to be trained."""
        check_writable(self.dir_checkpoint)
        epochs = checkpoint.list_epochs(self.dir_checkpoint)
        stale = [path for epoch, path in epochs.items() if epoch > state.saved_epoch]
        logs = [*self.dir_log.glob("events.out.tfevents*"), *self.dir_log.glob("arg.txt")]
        logs = [] if state.saved_epoch else logs
        for folder, files in ((self.dir_checkpoint, stale), (self.dir_log, logs)):
            if moved := move_aside(folder, files):
                say(f"what an earlier run left is kept in {moved}")
        write_arguments(self.dir_log / "arg.txt", self.config.as_typed() | {"network": state.net.arguments})
        names, shares = state.info.class_names, state.info.class_share
        say("training pixels: " + ", ".join(f"{n} {share:.1%}" for n, share in zip(names, shares, strict=True)))
        say(f"{sum(p.numel() for p in state.net.parameters()):,} weights on {self.device}")
        total = num_step * self.config.num_epoch
        if num_step < 4 and total < FEW and not self.config.max_minutes:
            advice = f"--num_epoch {math.ceil(ENOUGH / num_step)}, or --max_minutes"
            say(f"note: {total} steps are few: with so few images add {advice}")

    def _paced(self, state: TrainState, batches: TrainingBatches) -> Iterator[Batch]:
        """Batches of the epoch that are still to do, each with its learning rate; until a signal or the time is up."""
        config, first = self.config, len(state.losses)
        for step, batch in enumerate(batches.of(state.epoch, first), first):
            progress = self._agree(state, state.epoch - 1 + step / len(batches))
            if self.stopping or (config.max_minutes and progress >= 1 and step > first):
                return
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate(progress, config.lr, config.schedule, config.warmup)
            yield batch

    def _train_epoch(self, state: TrainState, net: nn.Module, batches: TrainingBatches) -> Scores:
        """Train what is left of an epoch; the losses go into the state."""
        start, first = time.perf_counter(), len(state.losses)

        def observe(*_: Any) -> None:
            if state.average:
                state.average.update(state.net)

        options = {"criterion": LOSSES[self._loss(state.info)], "clip": self.config.clip, "precision": self.precision}
        losses = run_epoch(net, self._paced(state, batches), state.optimizer, observe, scaler=state.scaler, **options)
        if losses:  # the epoch's one wait for the device
            state.losses += (self.world.sum(torch.stack(losses)) / self.world.size).tolist()
        seconds = time.perf_counter() - start
        done = batches.files_of(state.epoch)[: len(state.losses)]
        for step, (loss, files) in enumerate(zip(state.losses, done, strict=True), 1):
            _check_finite(loss, f"epoch {state.epoch}, step {step}", files)
        sizes = [len(files) for files in done]
        return {
            "loss/train": float(np.average(state.losses, weights=sizes)) if sizes else 0.0,
            "learning_rate": state.optimizer.param_groups[0]["lr"],
            "images_per_second": sum(sizes[first:]) / seconds,
        }

    def _validate(self, state: TrainState, files: list[SampleFile], log: TrainingLog, last: bool) -> Scores:
        """Scores over the whole validation images, without augmentation; of segments, too, where they are due."""
        config = self.config
        pictures = last or state.epoch == 1 or state.epoch % config.num_freq_disp == 0
        scorer = ValidationScorer(state.info, pictures=pictures)
        self._segment(self._predictor(state, self.precision), files, scorer, tta=False)
        self._agree(state, state.epoch)
        if self.stopping:
            return {}
        scorer.finish(self.world.gather)
        for loss, file in zip(scorer.losses, files, strict=True):
            _check_finite(loss, f"the validation of epoch {state.epoch}", [file])
        log.images(state.epoch, scorer.pictures or {})
        if not (last or state.epoch % config.num_freq_score == 0 or state.epoch % config.num_freq_save == 0):
            return scorer.scores()
        challenge = self._score_segments(state, files)
        return {} if self.stopping else scorer.scores(challenge)

    def _predictor(self, state: TrainState, precision: torch.dtype | None) -> Predictor:
        """The network that is validated, ready to segment."""
        background = find_background(state.info, self.config.background)
        return Predictor(fold_norm(state.best_net), state.info, state.threshold, self.device, precision, background)

    def _segment(
        self,
        predictor: Predictor,
        files: list[SampleFile],
        observe: Callable[[Segmented], None],
        *,
        tta: bool,
        heed: bool = True,
    ) -> None:
        """Segment what this process does of some samples, until a signal if it is to be heeded."""
        mine = range(self.world.rank, len(files), self.world.size)
        stop = self.stop if heed else ()
        for image in segment(predictor, files, mine, tta=tta, tile=self.config.tile, stop=lambda: bool(stop)):
            observe(image)

    def _score_segments(self, state: TrainState, files: list[SampleFile], *, heed: bool = True) -> Challenge | None:
        """Scores of the segments as the test infers them, in float32; sets the threshold of these weights."""
        if state.info.num_class > 2:
            return None
        predictor = self._predictor(state, None)
        scorer = SegmentScorer(predictor.background)
        self._segment(predictor, files, scorer, tta=self.config.tta, heed=heed)
        self._agree(state, state.epoch)
        if heed and self.stopping:
            return None
        challenge = scorer.finish(self.world.gather)
        best = challenge.best_threshold
        state.threshold = best if predictor.background == 0 else round(1 - best, 6)
        return challenge

    def _save_threshold(self, state: TrainState, files: list[SampleFile], path: Path) -> None:
        """Choose the threshold of weights that were saved at a signal, and save again; a second Ctrl-C ends at once."""
        if state.info.num_class > 2:
            return
        if self.world.is_main:
            say(f"saved {path}; now its threshold is chosen, Ctrl-C again leaves that out", sys.stderr)
        self._score_segments(state, files, heed=False)
        self._save(state, whole=False)

    def _save(self, state: TrainState, whole: bool) -> Path:
        """Write the checkpoint of an epoch, whole or interrupted."""
        path = checkpoint.path_of(self.dir_checkpoint, state.epoch)
        if not self.world.is_main:
            return path
        values = {
            "net": state.net.state_dict(),
            "optim": state.optimizer.state_dict(),
            "scaler": state.scaler.state_dict(),
            "arch": state.net.arguments,
            "data": asdict(state.info),
            "config": asdict(self.config),
            "epoch": state.epoch,
            "whole": whole,
            "losses": state.losses,
            "plan": state.plan,
            "threshold": state.threshold,
            "seconds": self._seconds(state),
            "run": distributed.run_id(),
            "average": state.average.state_dict() if state.average else None,
        }
        checkpoint.save(path, values)
        return path

    def _say_stopped(self, state: TrainState, num_step: int, path: Path) -> int:
        """Say where a training was stopped and how to go on; returns the exit status."""
        again = command_line([] if self.config.train_continue else ["--train_continue", "on"])
        where = f"epoch {state.epoch} after step {len(state.losses)} of {num_step}"
        if self.world.is_main:
            say(f"stopped in {where}, saved {path}; to go on: {again}", sys.stderr)
        return 128 + self.stopping

    def test(self) -> int:
        """Segment the test split (or another) with a checkpoint, and write pictures, `index.html` and scores.

        Raises
        ------
        UserError
            There is no checkpoint or no test sample, they don't fit, or the results can't be written.
        """
        path = checkpoint.find(self.dir_checkpoint, self.config.epoch)
        with self._reading_database():
            return self._test(path)

    def _test(self, path: Path) -> int:
        """Segment samples that nobody replaces meanwhile."""
        saved = self._load(path)
        predictor = predictor_of(checkpoint.Checkpoint.of(saved, path), path, self.device, None, self.config.background)
        files = self._checked(list_samples(self.dir_data / self.config.split), predictor.info, labelled=False)
        with self._results() as folder:
            scorer = TestScorer(folder / "images", files, predictor)
            self._segment(predictor, files, scorer, tta=self.config.tta)
            scorer.finish(self.world.gather)
            if self.world.is_main:
                self._write_results(folder, scorer, path, saved)
        if self.world.is_main:
            self._say_scores(scorer, saved["epoch"])
        return 0

    @contextmanager
    def _results(self) -> Iterator[Path]:
        """Folder that all processes write into, and that the first one puts in place when it is whole."""
        if not self.world.is_main:
            yield self.world.broadcast(Path())
            return
        with atomic_folder(self.dir_result, page.RESULTS, "choose another --scope or --dir_result") as folder:
            yield self.world.broadcast(folder)

    def _write_results(self, folder: Path, scorer: TestScorer, path: Path, saved: dict[str, Any]) -> None:
        """Write the tables of a test and its page."""
        facts = {"command": command_line(), "checkpoint": str(path), "epoch": saved["epoch"]}
        facts["split"] = self.config.split
        page.write_metrics(folder, facts | scorer.summary(), scorer.rows)
        title = f"{self.config.scope} / {self.config.name_data}: {scorer.legend}"
        page.write_index(folder, title, scorer.table(), facts | as_typed(saved["config"]))

    def _say_scores(self, scorer: TestScorer, epoch: int) -> None:
        """Print the table of a test, and what it is of."""
        say(page.format_table(page.main_scores(scorer.table())))
        say(f"epoch {epoch}; {scorer.legend}")
        if challenge := scorer.summary()["challenge"]:
            scores = ", ".join(f"{name} {value:.4f}" for name, value in challenge.items())
            say(f"as the ISBI 2012 challenge takes them, best of thresholds 0.1 to 0.9 on this test: {scores}")
        say(f"pictures and scores: {self.dir_result / 'index.html'}")
        if len(scorer.predicted) == 1:
            say("warning: the output of every image is one class: train longer, or check the labels", sys.stderr)


def _check_finite(loss: float, where: str, files: list[SampleFile]) -> None:
    """Stop a training that has broken down."""
    if not np.isfinite(loss):
        names = ", ".join(str(file.input) for file in files)
        raise UserError(
            f"the loss is {loss} in {where}, with {names}: nothing was saved; lower --lr, check these files"
        )
