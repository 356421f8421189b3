"""State of a training: new, resumed from a checkpoint, or saved as one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint import Checkpoint, explain_mismatch
from config import Config
from description import DataInfo
from device import to_device
from flags import as_typed
from model import NUM_LEVEL, UNet, init_weights
from training.cpu_layers import speed_up
from training.optim import OPTIMS, MovingAverage, load_optimizer_state
from utils import UserError

# flags that may change when resuming
PER_RUN = {"mode", "normalize", "train_continue", "epoch", "num_epoch", "max_minutes", "gpu_ids"}
PER_RUN |= {"init_from", "patience"}
CHOSEN = ("threshold", "certainty", "chosen_on")  # on the validation set, for the weights
# of a state, and of a checkpoint as well
SAVED = ("batch_settings", *CHOSEN, "best_epoch", "best_score")
NEW_TRAINING = "add --train_continue off for a new one"
HPARAM_GROUPS = ("model", "training", "data", "augmentation")  # groups of flags that results depend on


def hyperparameters(config: Config) -> dict[str, Any]:
    """Flags that results depend on, as typed, but for those of a single run: TensorBoard keeps the first values."""
    values = {"seed": config.seed}
    for group in HPARAM_GROUPS:
        values |= config.group(group)
    return as_typed({name: value for name, value in values.items() if name not in PER_RUN})


@dataclass
class TrainState:
    """State of a training: what a checkpoint holds of it, and what has happened since."""

    net: UNet
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of the loss, for float16; otherwise it does nothing
    info: DataInfo  # of the data that the network was first trained on
    config: Config  # flags of the run, with the architecture of the network
    epoch: int = 1  # the current one
    losses: list[float] = field(default_factory=list)  # of each batch of the current epoch until now
    last_losses: list[float] = field(default_factory=list)  # of the epoch before
    steps: list[Tensor] = field(default_factory=list)  # losses since `losses`, on the device: a step waits for nothing
    batch_settings: dict[str, Any] = field(default_factory=dict)  # that the batches of the current epoch depend on
    database: str = ""  # `description.identity` of the database
    saved_epoch: int = 0  # epoch of the checkpoint it was loaded from; 0: none
    average: MovingAverage | None = None  # of the weights
    threshold: float = 0.5  # for the probability of class 1, which scored best on the validation set
    certainty: float = 0.0  # that the probability of an object exceeds somewhere, chosen with the threshold
    chosen_on: list[int] | None = field(default_factory=lambda: [0, 0])  # as in a checkpoint
    seconds: float = 0.0  # time trained before this process
    best_epoch: int = 0  # with the best validation score until now; 0: none
    best_score: float | None = None

    @classmethod
    def begin(cls, config: Config, info: DataInfo, device: torch.device, precision: torch.dtype | None) -> TrainState:
        """State of a new training, with random weights."""
        if config.nch_in not in (0, info.nch_in):
            what = f"the images of the database have {info.nch_in} channel(s)"
            raise UserError(f"--nch_in {config.nch_in}: {what}: leave it out, or make another database")
        allowed = (1, 2) if info.num_class == 2 else (info.num_class,)
        if config.nch_out not in (0, *allowed):
            needed = " or ".join(map(str, allowed))
            raise UserError(f"--nch_out {config.nch_out}: {info.num_class} classes need {needed}: leave it out")
        shape = {name: getattr(config, name) for name in ("nch_ker", "norm", "pool", "dropout", "num_level")}
        net = UNet(info.nch_in, config.nch_out or allowed[0], **shape)
        init_weights(net, config.init, config.seed)
        return cls._around(net, config, info, device, precision)

    @classmethod
    def resume(
        cls, saved: Checkpoint, path: Path, config: Config, device: torch.device, precision: torch.dtype | None
    ) -> TrainState:
        """State from a checkpoint; the flags apply, except to the architecture."""
        if config.init_from and config.init_from != saved.config.get("init_from", ""):
            what = f"the training of {path} did not begin with it"
            raise UserError(f"--init_from {config.init_from}: {what}: leave it out to resume that, or {NEW_TRAINING}")
        architecture = saved_architecture(saved, config)
        for name, value in architecture.items():
            if flag := config.given(name):
                what = f"{path} was trained with --{name} {value}"
                raise UserError(f"{flag}: {what}: leave it out to resume that, or {NEW_TRAINING}")
        net = saved.network(path, averaged=False, dropout=config.dropout)
        state = cls._around(net, replace(config, **architecture), saved.info, device, precision)
        with explain_mismatch(path):
            if state.average and saved.average:
                state.average.load_state_dict(saved.average)
            optims = {saved.config["optim"], config.optim}
            if len(optims) == 1 or optims == {"adam", "adamw"}:  # which differ only in weight decay
                load_optimizer_state(state.optimizer, saved.optim)
            if state.scaler.is_enabled() and saved.scaler:
                state.scaler.load_state_dict(saved.scaler)
        for name in ("epoch", "losses", "seconds", *SAVED):
            setattr(state, name, getattr(saved, name))
        state.saved_epoch = saved.epoch
        if saved.epoch_complete:
            state.next_epoch()
        return state

    @classmethod
    def _around(
        cls, net: UNet, config: Config, info: DataInfo, device: torch.device, precision: torch.dtype | None
    ) -> TrainState:
        """State with a network and a new optimiser."""
        net = to_device(net, net.arguments["norm"], device, precision)
        if device.type == "cpu":
            speed_up(net)
        optimizer = OPTIMS[config.optim](net.parameters(), config.lr, config.beta1)
        scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)
        average = MovingAverage(net, config.average) if config.average else None
        return cls(net, optimizer, scaler, info, config, average=average)

    @property
    def averaged_net(self) -> UNet:
        """Network to validate and test with: the moving average, if there is one."""
        return self.average.net if self.average else self.net

    def note_batch_settings(self, batch_settings: dict[str, Any], num_step: int) -> str:
        """Start an interrupted epoch again if its batches have changed; return why, or an empty text."""
        before, self.batch_settings = batch_settings | self.batch_settings, batch_settings
        changed = [
            f"{name} changed from {before[name]} to {value}"
            for name, value in batch_settings.items()
            if before[name] != value
        ]
        if not self.losses or not (changed or len(self.losses) > num_step):
            return ""
        self.losses = []
        return ", ".join(changed) or "fewer samples"

    def use_database(self, info: DataInfo) -> None:
        """Go on with a database that was made again; images are scaled as the network knows them."""
        before = self.info
        self.info = replace(info, mean=before.mean, std=before.std, normalize=before.normalize)
        self.losses = []  # the epoch starts again

    @property
    def position(self) -> tuple[int, int]:
        """Epoch of the last step, and the number of its steps that are done."""
        done = len(self.losses) + len(self.steps)
        return (self.epoch, done) if done or self.epoch == 1 else (self.epoch - 1, len(self.last_losses))

    def next_epoch(self) -> None:
        """Start the next epoch."""
        self.epoch, self.last_losses, self.losses = self.epoch + 1, self.losses, []

    def checkpoint(self, *, epoch_complete: bool, seconds: float) -> Checkpoint:
        """Checkpoint of this state; an epoch without a step is saved as the end of the one before."""
        epoch, losses = self.epoch, self.losses
        if not losses and epoch > 1:
            epoch, epoch_complete, losses = epoch - 1, True, self.last_losses
        return Checkpoint(
            net=self.net.state_dict(),
            optim=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            arch=self.net.arguments,
            info=self.info,
            config=asdict(self.config),
            epoch=epoch,
            epoch_complete=epoch_complete,
            losses=losses,
            seconds=seconds,
            database=self.database,
            average=self.average.state_dict() if self.average else None,
            **{name: getattr(self, name) for name in SAVED},
        )


def saved_architecture(saved: Checkpoint, config: Config) -> dict[str, Any]:
    """Flags of the architecture with the values of a checkpoint, where those differ; a resumed run uses them."""
    architecture = {"num_level": NUM_LEVEL} | saved.arch
    return {name: value for name, value in architecture.items() if getattr(config, name) not in (0, value)}


def changed_flags(saved: Checkpoint, config: Config) -> list[str]:
    """Notes on the flags that differ from those of the checkpoint."""
    architecture, before = saved_architecture(saved, config), as_typed(saved.config)
    others = before.keys() - {f"--{name}" for name in PER_RUN | architecture.keys()}
    notes = [
        f"{name} changed from {before[name]} to {value}"
        for name, value in config.as_typed().items()
        if name in others and not name.startswith("--dir_") and value != before[name]
    ]
    if architecture:
        notes.append(f"{' '.join(f'--{name} {value}' for name, value in architecture.items())}, as in the checkpoint")
    if config.normalize != saved.info.normalize:
        notes.append(f"--normalize stays {saved.info.normalize}, as in the checkpoint")
    if saved.config.keys() <= {"optim"}:
        return [*notes, "the checkpoint of pytorch-UNET tells no other flags: those of this command apply"]
    added = {name: value for name, value in hyperparameters(config).items() if name not in before}
    if added:
        flags = " ".join(f"{name} {value}" for name, value in added.items())
        notes.append(f"{flags}: the checkpoint is of an older version, which had no such flag")
    return notes


def num_weight(net: nn.Module) -> int:
    """Number of weights of a network."""
    return sum(weights.numel() for weights in net.parameters())
