import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, SMALL, annotate_partly, checkpoint_of, curves, events, needs_golden, same, write_info

import checkpoint
import main
from checkpoint import Checkpoint
from description import load_info
from evaluation import metrics
from evaluation.curves import read_curves
from evaluation.scorers import Challenge
from model import UNet
from prediction import predictor
from prediction.predictor import load, predict_array
from samples import SampleFile, list_samples, write_sample
from train import train_step
from training.log import TrainingLog
from training.weight_map import cache_border_distances


@contextmanager
def other_process(context):
    """Another process in a context of `locks`, for as long as this one is in here."""
    code = f"from pathlib import Path; from locks import *\nwith {context}: print(); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as process:
        process.stdout.readline()
        yield
        process.stdin.close()


def test_train_step_updates_the_weights_and_returns_the_loss():
    net = UNet(1, 1, 2)
    batch = {"input": torch.randn(2, 1, 32, 32), "label": torch.randint(0, 2, (2, 32, 32))}
    before = torch.cat([p.detach().flatten() for p in net.parameters()])
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    first, second = train_step(net, batch, optimizer), train_step(net, batch, optimizer)
    assert second < first and not first.requires_grad
    assert not before.equal(torch.cat([p.detach().flatten() for p in net.parameters()]))


def test_train_imports_no_compiler(database):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import main; main.main(sys.argv[1:])"
    code += "; print('torch._dynamo' in sys.modules)"
    flags = [*SMALL, "--num_epoch", "1", "--compile", "off"]
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("optim", ["adam", "sgd", "rmsprop"])
def test_train_resumed_is_the_unbroken_run_bit_for_bit(database, work, optim):
    # a cosine that ends at epoch 3 is another run than one that ends at 5
    flags = [*SMALL, "--num_freq_save", "2", "--schedule", "constant", "--optim", optim, "--lr", "1e-2"]
    assert main.main([*flags, "--scope", "whole", "--num_epoch", "5"]) == 0
    assert main.main([*flags, "--num_epoch", "3"]) == 0
    assert main.main([*flags, "--num_epoch", "5", "--train_continue", "on"]) == 0
    whole, resumed = checkpoint_of(work, 5, "whole"), checkpoint_of(work, 5)
    assert same(whole.net, resumed.net) and same(whole.optim, resumed.optim)
    assert curves(work, "whole") == curves(work)
    assert [epoch for epoch, _ in curves(work)["loss/train"]] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("signum", "call", "epoch", "step"),
    [
        (signal.SIGINT, 6, 2, 2),
        (getattr(signal, "SIGHUP", signal.SIGTERM), 7, 2, 3),
        (signal.SIGINT, 8, 2, 3),  # during validation
        (signal.SIGTERM, 9, 3, 1),  # in the last epoch
        (signal.SIGINT, 12, 3, 3),  # in the last validation
    ],
)
def test_train_stopped_saves_within_the_epoch_and_resumes_bit_for_bit(
    database, work, stop_at_forward, signum, call, epoch, step, capfd
):
    # an epoch calls the network three times to train (6 images, batches of 2) and once to validate
    flags = [*SMALL, "--num_epoch", "3", "--batch_size", "2"]
    assert main.main([*flags, "--scope", "whole"]) == 0
    stop_at_forward(signum, call)
    assert main.main(flags) == 128 + signum
    message = capfd.readouterr().err.splitlines()[-1]
    assert f"epoch {epoch} after step {step} of 3" in message and "to resume: python" in message
    assert not checkpoint_of(work, epoch).epoch_complete
    assert main.main(flags) == 0
    whole, resumed = checkpoint_of(work, 3, "whole"), checkpoint_of(work, 3)
    assert same(whole.net, resumed.net) and same(whole.optim, resumed.optim)
    assert curves(work, "whole") == curves(work)
    assert main.main(["--mode", "test", "--gpu_ids", "-1"]) == 0


@pytest.mark.parametrize(
    "changed", [["--batch_size", "6"], ["--batch_size", "1"], ["--seed", "1"], ["--ny_load", "16"], []]
)
def test_note_batch_settings_starts_an_epoch_of_other_batches_again(database, work, stop_at_forward, changed, capsys):
    flags = [*SMALL, "--batch_size", "2", "--train_continue"]
    stop_at_forward(signal.SIGTERM, 3)
    assert main.main([*flags, "off", "--num_epoch", "2"]) == 143
    if not changed:  # one image less
        (database / "train" / "00000.npy").unlink()
    assert main.main([*flags, "on", "--num_epoch", "1", *changed]) == 0
    assert "epoch 1 starts again: " in capsys.readouterr().out
    saved = checkpoint_of(work, 1)
    num_step = {"--batch_size": {"6": 1, "1": 6}}.get((changed or [""])[0], {}).get((changed or [0, 0])[1], 3)
    assert saved.epoch_complete and len(saved.losses) == num_step


def test_train_locks_its_scope(trained, work, fails):
    for folder in (work / "checkpoints", work / "log"):
        with other_process(f"locked(Path({str(folder / 'unet' / 'em')!r}), '')"):
            line = fails(main.main, [*SMALL, "--num_epoch", "2", "--train_continue", "on"])
            assert "is in use" in line and "choose another --scope" in line
    assert main.main([*SMALL, "--num_epoch", "2", "--train_continue", "on"]) == 0
    assert not list(work.rglob(".lock"))


def test_train_refuses_a_database_that_is_being_replaced(database, fails):
    with other_process(f"locked(Path({str(database)!r}), '')"):
        assert "is in use" in fails(main.main, [*SMALL, "--num_epoch", "1"])


@pytest.mark.parametrize("cache_gb", ["0", "2"])
def test_train_locks_its_database(database, monkeypatch, cache_gb):
    seen = []
    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", lambda *_: seen.append((database / ".lock").exists()))
    assert main.main([*SMALL, "--num_epoch", "1", "--cache_gb", cache_gb, "--num_workers", "0"]) == 0
    assert seen == [True] * 2 and not (database / ".lock").exists()


@pytest.mark.parametrize("first", ["arguments", "precision_recall", "hparams", "images", "scalars"])
def test_log_on_a_full_disk_ends_the_curves_and_not_the_training(tmp_path, capsys, first):
    scores = {"loss/train": 0.5}
    kinds = {
        "arguments": lambda log, epoch: log.arguments(epoch, {"--lr": 0.1}, {}),
        "precision_recall": lambda log, epoch: log.precision_recall(epoch, np.ones((2, 127))),
        "hparams": lambda log, epoch: log.hparams(epoch, {"--lr": 0.1}, scores),
        "images": lambda log, epoch: log.images(epoch, {"input": np.zeros((9, 9), np.uint8)}),
        "scalars": lambda log, epoch: log.scalars(epoch, scores, epoch / 99),
    }
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (99, limits[1]))  # as a disk that fills up, in the first event of a kind
    try:
        with closing(TrainingLog(tmp_path, 1, 99, 0.0)) as log:
            log.arguments(1, {"--lr": 0.1}, {})
            log.open()
            for epoch in range(1, 99):
                for name in sorted(kinds, key=lambda name: name != first):
                    kinds[name](log, epoch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    out, err = capsys.readouterr()
    warnings = [line for line in err.splitlines() if "cannot write" in line]
    assert len(warnings) == 1 and str(tmp_path) in warnings[0] and "epoch 98/99" in out


def test_log_has_flags_both_losses_and_precision_recall(database, work):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = [*SMALL, "--num_freq_score", "1"]
    assert main.main([*flags, "--num_epoch", "1"]) == 0
    assert main.main([*flags, "--num_epoch", "2", "--train_continue", "on"]) == 0
    log = events(work)
    assert b"| --num_freq_score | `1` |" in log.Tensors("flags/text_summary")[-1].tensor_proto.string_val[0]
    validation = EventAccumulator(str(work / "log/unet/em/validation")).Reload()  # a run with a colour of its own
    for run, name in ((log, "loss/train"), (validation, "loss/val")):
        assert [(event.step, event.value) for event in run.Scalars("loss")] == curves(work)[name]
    assert validation.Tags()["scalars"] == ["loss"]
    points = log.Tensors("foreground")
    assert [event.step for event in points] == [1, 2]
    tp, fp, tn, fn, precision, recall = np.reshape(points[-1].tensor_proto.float_val, (6, 127))
    assert (tp + fp + tn + fn == 48 * 48).all() and recall[0] == 1 and precision[0] == tp[0] / 48**2
    content = log.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert (
        b"--lr" in content
        and b"--num_epoch" not in content
        and b"pixel_error" in log.summary_metadata["_hparams_/experiment"].plugin_data.content
    )


def test_train_saves_the_epoch_whose_validation_fails(database, work, fails, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(predictor, "forward_tile", fail)
    assert "out of memory" in fails(main.main, [*SMALL, "--num_epoch", "1"])
    assert not checkpoint_of(work, 1).epoch_complete and len(checkpoint_of(work, 1).losses) == 2


@pytest.mark.parametrize("flags", [["--train_continue", "off"], ["--epoch", "1"]])
def test_train_restarted_by_torchrun_is_not_begun_again(trained, work, monkeypatch, fails, capfd, flags):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "use --train_continue on, without --epoch" in fails(main.main, [*SMALL, "--num_epoch", "2", *flags])
    assert main.main([*SMALL, "--num_epoch", "2"]) == 0
    assert "resuming from checkpoints/unet/em/model_epoch0001.pth" in capfd.readouterr().out
    shutil.rmtree(work / "checkpoints")
    assert main.main([*SMALL, "--num_epoch", "1", "--train_continue", "off"]) == 0


def test_stop_of_a_run_with_epoch_advises_to_resume_from_the_newest(trained, stop_at_forward, capfd):
    flags = [*SMALL, "--train_continue", "--epoch", "1", "--num_epoch", "3"]
    stop_at_forward(signal.SIGTERM, 2)  # in epoch 2
    assert main.main(flags) == 143
    assert capfd.readouterr().err.splitlines()[-1].endswith("--epoch 0")
    assert main.main([*flags, "--epoch", "0"]) == 0
    assert "resuming from checkpoints/unet/em/model_epoch0002.pth" in capfd.readouterr().out


def test_train_saves_and_stops_when_nobody_reads_its_output(database, work, start):
    os.mkfifo("pipe")
    process = start(main.main, *SMALL, "--num_epoch", "1000", out=work / "pipe")
    with (work / "pipe").open() as pipe:
        while "epoch 1/" not in pipe.readline():
            assert process.poll() is None
    _, err = process.communicate()
    assert process.returncode == 141 and "saved" in err.splitlines()[-1]
    epoch = max(checkpoint.list_epochs(work / "checkpoints" / "unet" / "em"))
    assert 0 < epoch < 1000


FULL = ["--optim", "adamw", "--schedule", "cosine", "--warmup", "0.2", "--clip", "1", "--average", "0.9"]
FULL += ["--loss", "wbce", "--dropout", "0.3", "--gamma", "0.2", "--blur", "1", "--noise", "0.2"]


def test_train_with_every_part_of_the_recipe_resumes_bit_for_bit(database, work, stop_at_forward):
    flags = [*SMALL, *FULL, "--num_epoch", "4", "--batch_size", "2"]
    assert main.main([*flags, "--scope", "whole"]) == 0
    stop_at_forward(signal.SIGTERM, 6)
    assert main.main(flags) == 143
    assert main.main([*flags, "--train_continue", "on"]) == 0
    whole, resumed = checkpoint_of(work, 4, "whole"), checkpoint_of(work, 4)
    assert all(same(getattr(whole, name), getattr(resumed, name)) for name in ("net", "optim", "average"))
    assert curves(work, "whole") == curves(work)
    rates = [rate for _, rate in curves(work)["learning_rate"]]
    assert rates == sorted(rates, reverse=True) and 0 < rates[-1] < 0.2 * rates[0]


def test_amp_fp16_scales_the_loss_and_resumes_with_its_scale(database, work, stop_at_forward):
    flags = [*SMALL, "--amp", "fp16", "--num_epoch", "2", "--batch_size", "2"]
    assert main.main([*flags, "--scope", "whole"]) == 0
    stop_at_forward(signal.SIGTERM, 2)
    assert main.main(flags) == 143
    assert main.main([*flags, "--train_continue", "on"]) == 0
    whole, resumed = checkpoint_of(work, 2, "whole"), checkpoint_of(work, 2)
    assert same(whole.net, resumed.net) and whole.scaler == resumed.scaler
    assert whole.scaler["_growth_tracker"] == 6  # steps without an overflow


@pytest.mark.slow
def test_max_minutes_ends_in_time_with_the_schedule_and_goes_on(database, work):
    flags = [*SMALL, *FULL, "--num_epoch", "1"]
    start = time.monotonic()
    assert main.main([*flags, "--max_minutes", "0.02"]) == 0
    assert time.monotonic() - start < 10
    path = checkpoint.find(work / "checkpoints" / "unet" / "em")
    epoch = checkpoint.epoch_of(path)
    rates = [rate for _, rate in curves(work)["learning_rate"]]
    assert len(rates) == epoch > 2 and rates[-1] < 0.1 * max(rates)
    assert Checkpoint.load(path).seconds >= 1.2
    assert main.main([*flags, "--max_minutes", "0.02", "--train_continue", "on"]) == 0
    assert checkpoint.find(path.parent) == path
    assert main.main([*flags, "--max_minutes", "0.045", "--train_continue", "on"]) == 0
    assert checkpoint.epoch_of(checkpoint.find(path.parent)) > epoch


def test_average_is_what_is_validated_and_tested(database, work):
    flags = [*SMALL, "--num_epoch", "3", "--lr", "0.1"]
    assert main.main([*flags, "--average", "0.9"]) == 0
    assert main.main([*flags, "--average", "0", "--scope", "plain"]) == 0
    averaged, plain = checkpoint_of(work, 3), checkpoint_of(work, 3, "plain")
    assert same(averaged.net, plain.net)  # the average does not touch the training
    assert not same(averaged.average["net"], averaged.net)
    assert curves(work)["loss/val"] != curves(work, "plain")["loss/val"]
    for scope in ("unet", "plain"):
        assert main.main(["--mode", "test", "--gpu_ids", "-1", "--scope", scope]) == 0
    losses = [(work / "results" / scope / "em" / "metrics.csv").read_text() for scope in ("unet", "plain")]
    assert losses[0] != losses[1]


def test_train_step_clips_a_gradient_to_its_norm():
    net = UNet(1, 1, 2)
    batch = {"input": 100 * torch.randn(2, 1, 32, 32), "label": torch.ones(2, 32, 32)}
    train_step(net, batch, torch.optim.SGD(net.parameters(), 0.0), clip=1e-3)
    assert torch.cat([p.grad.flatten() for p in net.parameters()]).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_num_workers_streams_from_the_disk_to_the_same_weights(database, work):
    flags = [*SMALL, "--num_epoch", "2", "--batch_size", "3"]
    for scope, more in (("memory", []), ("disk", ["--cache_gb", "0", "--num_workers", "2"])):
        assert main.main([*flags, "--scope", scope, *more]) == 0
    assert same(checkpoint_of(work, 2, "memory").net, checkpoint_of(work, 2, "disk").net)


@pytest.mark.parametrize("signum", [signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)])
def test_num_workers_ignore_a_signal_to_all_processes_until_the_save(database, work, signum):
    started = []

    def hook(module, _):
        if isinstance(module, UNet) and not started:
            started.extend(multiprocessing.active_children())
            for process in started:
                os.kill(process.pid, signum)
            signal.raise_signal(signum)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    assert main.main([*SMALL, "--batch_size", "1", "--cache_gb", "0", "--num_workers", "1"]) == 128 + signum
    handle.remove()
    assert len(started) == 1 and len(checkpoint_of(work, 1).losses) == 1


def test_train_off_moves_the_earlier_training_aside(trained, work):
    before = (work / "checkpoints" / "unet" / "em" / "model_epoch0001.pth").read_bytes()
    assert main.main([*SMALL, "--num_epoch", "2", "--num_freq_save", "2", "--train_continue", "off"]) == 0
    folder = work / "checkpoints" / "unet" / "em"
    assert sorted(path.name for path in folder.iterdir()) == ["earlier-1", "model_best.pth", "model_epoch0002.pth"]
    assert sorted(path.name for path in (folder / "earlier-1").iterdir()) == ["model_best.pth", "model_epoch0001.pth"]
    assert (folder / "earlier-1" / "model_epoch0001.pth").read_bytes() == before
    kept = sorted(path.name.split(".")[0] for path in (work / "log" / "unet" / "em" / "earlier-1").iterdir())
    assert kept == ["arg", "events", "validation"]
    assert len([*(work / "log/unet/em/validation").iterdir()]) == 1
    assert [epoch for epoch, _ in curves(work)["loss/train"]] == [1, 2]


@needs_golden
def test_legacy_network_sees_images_of_each_type_as_it_was_trained(work):
    predictor = load(SHARED / "golden" / "upstream" / "bnorm_model_epoch0003.pth")
    image = np.random.default_rng(0).integers(0, 256, (48, 48), np.uint8)
    ours, theirs = (predict_array(predictor, pixels, tta=False) for pixels in (image, np.float32(image / 255)))
    assert np.allclose(ours, theirs, atol=1e-5) and ours.std() > 0
    predicted = predict_array(predictor, image.astype(np.uint16), tta=False)
    assert not np.allclose(predicted, ours, atol=1e-2)


def test_epoch_flag_moves_newer_checkpoints_aside(trained, work):
    flags = [*SMALL, "--num_freq_save", "1", "--train_continue", "on"]
    assert main.main([*flags, "--num_epoch", "4"]) == 0
    assert main.main([*flags, "--num_epoch", "3", "--epoch", "1", "--num_freq_save", "9"]) == 0
    assert checkpoint.find(work / "checkpoints" / "unet" / "em").name == "model_epoch0003.pth"
    assert [epoch for epoch, _ in curves(work)["loss/train"]] == [1, 2, 3]
    on_page = read_curves(work / "log" / "unet" / "em")
    assert {name: on_page[name] for name in curves(work)} == curves(work)


def test_resume_with_another_learning_rate_goes_on_from_the_moments(trained, work, capsys):
    more = ["--num_epoch", "2", "--train_continue", "on"]
    assert main.main([*SMALL, *more, "--lr", "0.5", "--schedule", "constant"]) == 0
    assert "--lr changed from 0.002 to 0.5" in capsys.readouterr().out
    saved = checkpoint_of(work, 2)
    assert saved.optim["param_groups"][0]["lr"] == 0.5
    assert saved.optim["state"][0]["step"] == 4  # two epochs of two batches
    assert main.main([*SMALL, "--num_epoch", "2", "--train_continue", "on"]) == 0
    assert "already" in capsys.readouterr().out


def test_train_writes_what_the_design_says(trained, work):
    log = work / "log" / "unet" / "em"
    assert any(re.match(r"events\.out\.tfevents", path.name) for path in log.iterdir())
    assert re.search(r"^--nch_ker +2$", (log / "arg.txt").read_text(), re.MULTILINE)
    tags = events(work).Tags()
    assert {
        "loss/train",
        "loss/val",
        "learning_rate",
        "dice/cell",
        "iou/cell",
        "pixel_error",
        "images_per_second",
    } <= set(tags["scalars"])
    assert set(tags["images"]) == {"input", "label", "output"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--optim sgd --lr 1e30 --norm none", r"the loss is (nan|inf) in .*epoch \d.* lower --lr"),
        ("--lr 1e10", "output is NaN: train with a lower --lr"),  # of the validation
    ],
)
def test_check_finite_stops_before_saving_and_names_the_samples(database, work, fails, flags, words):
    line = fails(main.main, [*SMALL, "--num_epoch", "9", *flags.split()])
    assert re.search(words, line)
    assert re.search(r"\d{5}\.npy", line)
    assert not list((work / "checkpoints").rglob("*.pth"))


def test_training_scores_average_over_images_not_batches(database, work):
    assert main.main([*SMALL, "--num_epoch", "1", "--batch_size", "4"]) == 0  # six images: batches of four and two
    first, second = checkpoint_of(work, 1).losses
    assert curves(work)["loss/train"] == [(1, pytest.approx((4 * first + 2 * second) / 6))]


def test_train_learns_three_classes_of_two_channels(work, capsys):
    rng = np.random.default_rng(0)
    for split, num in (("train", 4), ("val", 1), ("test", 1)):
        (work / "datasets" / "em" / split).mkdir(parents=True)
        for i in range(num):
            label = np.repeat(rng.integers(0, 3, (6, 6), np.uint8), 8, 0).repeat(8, 1)
            image = np.stack([label == 1, label == 2], -1) * 1000 + rng.normal(0, 50, (48, 48, 2))
            write_sample(work / "datasets" / "em" / split / f"{i}.npy", image.astype(np.uint16), label)
    write_info(work / "datasets" / "em", 3)
    assert main.main([*SMALL, "--nch_ker", "4", "--num_epoch", "20", "--batch_size", "1", "--lr", "1e-2"]) == 0
    assert main.main(["--mode", "test", "--gpu_ids", "-1"]) == 0
    assert "dice_2" in capsys.readouterr().out
    saved = checkpoint_of(work, 20)
    assert saved.arch["nch_in"] == 2 and saved.arch["nch_out"] == 3
    scores = (work / "results" / "unet" / "em" / "metrics.csv").read_text().splitlines()
    header, mean = scores[0].split(","), scores[-1].split(",")
    assert float(mean[header.index("dice_2")]) > 0.9


@pytest.mark.parametrize("wrong", [np.zeros((3, 3), np.float16), np.zeros((0, 48), np.float16), np.zeros((48, 48))])
def test_cache_border_distances_replaces_those_of_another_sample(trained, wrong):
    path = trained / "train" / "00001.distance.npy"
    kept = np.load(path)
    np.save(path, wrong)
    assert main.main([*SMALL, "--num_epoch", "2"]) == 0
    assert np.array_equal(np.load(path), kept)


def test_cache_border_distances_works_in_two_trainings_at_once(database):
    files = list_samples(database / "train")
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(cache_border_distances, files, load_info(database)) for _ in range(2)]:
            done.result()
    assert all(file.open_distance().shape == (48, 48) for file in files)


def test_map_npy_refuses_a_pipe_and_does_not_wait_for_it(database, fails):
    (database / "train" / "00001.npy").unlink()
    os.mkfifo(database / "train" / "00001.npy")
    assert "00001.npy" in fails(main.main, [*SMALL, "--num_epoch", "1"])


def test_cache_border_distances_follows_a_sample_that_changes(database, work):
    flags = [*SMALL, "--num_epoch", "1", "--loss", "wbce", "--train_continue", "off"]
    assert main.main(flags) == 0
    kept = sorted((database / "train").glob("*.distance.npy"))
    assert len(kept) == len(list_samples(database / "train")) == 6 and not list((database / "val").glob("*distance*"))
    first, files = np.load(kept[0]), [path.stat().st_ino for path in kept]
    assert main.main(flags) == 0
    assert [path.stat().st_ino for path in kept] == files
    sample = list_samples(database / "train")[0].input
    image, label = (np.array(array) for array in SampleFile(sample).open())
    write_sample(sample, image, np.ascontiguousarray(label[:, ::-1]))
    assert main.main(flags) == 0
    assert np.array_equal(np.load(kept[0]), first[:, ::-1]) and kept[1].stat().st_ino == files[1]


def test_curves_of_a_run_resumed_with_the_clock_set_back_keep_all_epochs(trained, work):
    flags, log = [*SMALL, "--train_continue", "on"], work / "log" / "unet" / "em"
    (first,) = log.glob("events*")
    assert main.main([*flags, "--num_epoch", "3"]) == 0
    (second,) = {*log.glob("events*")} - {first}
    second.rename(log / "events.out.tfevents.1000000000.host.1")  # as if it had been 2001
    assert [epoch for epoch, _ in read_curves(log)["loss/train"]] == [1, 2, 3]
    assert main.main([*flags, "--epoch", "1", "--num_epoch", "2"]) == 0  # trains epoch 2 again
    assert [epoch for epoch, _ in read_curves(log)["loss/train"]] == [1, 2]


@pytest.mark.parametrize("loss", ["bce", "wbce", "dice", "bce+dice"])
@pytest.mark.parametrize("nch_out", ["1", "2"])
def test_loss_of_every_name_learns(database, work, loss, nch_out):
    flags = [*SMALL, "--nch_ker", "4", "--num_epoch", "6", "--batch_size", "2", "--lr", "4e-2"]
    assert main.main([*flags, "--loss", loss, "--nch_out", nch_out]) == 0
    losses = [value for _, value in curves(work)["loss/train"]]
    assert losses[-1] < 0.7 * losses[0]


def test_train_learns_by_the_papers_recipe(database, work):
    paper = "--norm none --pool max --dropout 0.5 --optim sgd --beta1 0.99 --lr 1e-3 --schedule constant --average 0"
    assert main.main([*SMALL, *paper.split(), "--batch_size", "1", "--loss", "wbce", "--num_epoch", "2"]) == 0
    assert checkpoint_of(work, 2).arch["pool"] == "max"
    assert main.main(["--mode", "test", "--gpu_ids", "-1"]) == 0


def test_num_crop_is_24_in_an_epoch_of_few_images(database, work):
    flags = [flag for flag in SMALL if flag not in ("--num_crop", "6")]
    assert main.main([*flags, "--num_epoch", "1", "--batch_size", "5"]) == 0
    assert len(checkpoint_of(work, 1).losses) == 5
    assert checkpoint_of(work, 1).batch_settings["num_crop"] == 24


@pytest.mark.parametrize("loss", ["bce", "wbce", "dice", "bce+dice"])
def test_partial_labels_train_weights_whatever_lies_below_ignored_pixels(database, work, loss):
    kept, nets = work / "kept", {}
    shutil.copytree(database, kept)
    for name, arguments in {"one": (1,), "other": (2,), "whole": (0,), "labelled otherwise": (1, 1)}.items():
        shutil.rmtree(database)
        shutil.copytree(kept, database)
        annotate_partly(database, *arguments)
        assert main.main([*SMALL, "--num_epoch", "2", "--loss", loss, "--train_continue", "off"]) == 0
        nets[name] = checkpoint_of(work, 2).net
    assert same(nets["one"], nets["other"])
    assert not same(nets["one"], nets["whole"]) and not same(nets["one"], nets["labelled otherwise"])


def test_partial_labels_stream_and_resume_bit_for_bit(database, work, stop_at_forward):
    annotate_partly(database, 1)
    flags = [*SMALL, "--num_epoch", "2", "--loss", "bce", "--batch_size", "2"]
    assert main.main([*flags, "--scope", "whole"]) == 0
    stop_at_forward(signal.SIGTERM, 2)
    streamed = [*flags, "--cache_gb", "0", "--num_workers", "2"]
    assert main.main(streamed) == 143
    assert main.main([*streamed, "--train_continue", "on"]) == 0
    assert same(checkpoint_of(work, 2, "whole").net, checkpoint_of(work, 2).net)


def test_resume_goes_on_with_labels_that_have_become_partial(trained, work):
    annotate_partly(trained, 1)
    flags = [*SMALL, "--num_freq_save", "1", "--train_continue", "on"]
    assert main.main([*flags, "--num_epoch", "2"]) == 0
    assert checkpoint_of(work, 1).info.ignore is None and checkpoint_of(work, 2).info.ignore == 128


@pytest.mark.parametrize(("was", "again"), [(6, False), (24, True)])
def test_note_batch_settings_starts_an_epoch_of_another_num_crop_again(
    database, work, stop_at_forward, was, again, capsys
):
    flags = [*SMALL, "--batch_size", "2", "--num_epoch", "1", "--train_continue"]
    stop_at_forward(signal.SIGTERM, 2)
    assert main.main([*flags, "off"]) == 143
    path = work / "checkpoints" / "unet" / "em" / "model_epoch0001.pth"
    saved = Checkpoint.load(path)
    replace(saved, batch_settings=saved.batch_settings | {"num_crop": was}).save(path)
    assert main.main([*flags, "on"]) == 0
    assert ("epoch 1 starts again: num_crop changed from 24 to 6" in capsys.readouterr().out) == again
    assert len(checkpoint_of(work, 1).losses) == 3


def test_split_val_has_the_scores_of_the_validation(database, work, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True})  # else all is in float32
    assert main.main([*SMALL, "--num_epoch", "1"]) == 0
    assert main.main(["--mode", "test", "--gpu_ids", "-1", "--split", "val"]) == 0
    metrics = json.loads((work / "results" / "unet" / "em" / "metrics.json").read_text())
    assert metrics["split"] == "val"
    validation = curves(work, every_epoch=False)
    for name, score in (("max/v_info", "max_v_info"), ("min_pixel_error", "min_pixel_error")):
        assert validation[name] == [(1, pytest.approx(metrics["challenge"][score], abs=1e-7))]
    assert len(list((work / "results" / "unet" / "em" / "images").glob("*-output.png"))) == len(
        list_samples(database / "val")
    )


def threshold_chosen_by_hand(work, epoch, split="val"):
    """Best threshold of the segments of a checkpoint's own weights, by the test's inference."""
    predictor = load(work / "checkpoints" / "unet" / "em" / f"model_epoch{epoch:04d}.pth")
    rows = []
    for file in list_samples(work / "datasets" / "em" / split):
        image, label = file.open()
        rows.append(metrics.challenge_scores(label, predict_array(predictor, image[..., 0])))
    return Challenge(rows).best_threshold


def test_threshold_of_every_checkpoint_is_chosen_for_its_weights(database, work, stop_at_forward):
    flags = [*SMALL, "--num_freq_save", "1", "--batch_size", "2", "--lr", "1e-2"]
    stop_at_forward(signal.SIGINT, 2 * (3 + 1 + 2) + 2)  # in epoch 3; a save is scored by eight views, four at once
    assert main.main([*flags, "--num_epoch", "4"]) == 130
    epochs = sorted(checkpoint.list_epochs(work / "checkpoints" / "unet" / "em"))
    assert epochs == [1, 2, 3] and not checkpoint_of(work, 3).epoch_complete
    for epoch in epochs:
        assert checkpoint_of(work, epoch).threshold == threshold_chosen_by_hand(work, epoch)


def test_stop_by_a_second_ctrl_c_leaves_the_first_save(database, work, stop_at_forward, capfd):
    stop_at_forward(signal.SIGINT, 6)
    stop_at_forward(signal.SIGINT, 8)  # while the threshold is chosen
    assert main.main([*SMALL, "--num_epoch", "3", "--batch_size", "2"]) == 130
    assert "interrupted" in capfd.readouterr().err.splitlines()[-1]
    assert not checkpoint_of(work, 2).epoch_complete
    assert main.main([*SMALL, "--num_epoch", "3", "--batch_size", "2", "--train_continue", "on"]) == 0


def wide(work, num_class=2, width=75):
    """A database of sections 64 px high."""
    rng = np.random.default_rng(0)
    for split, num in (("train", 2), ("val", 1), ("test", 1)):
        (work / "datasets" / "em" / split).mkdir(parents=True)
        for i in range(num):
            label = rng.integers(0, num_class, (8, width), np.uint8).repeat(8, 0).repeat(8, 1)
            image = (label * 60 + rng.normal(60, 20, label.shape)).clip(0, 255)
            write_sample(work / "datasets" / "em" / split / f"{i}.npy", image.astype(np.uint8)[..., None], label)
    write_info(work / "datasets" / "em", num_class)


def scores_of(work, scope):
    return json.loads((work / "results" / scope / "em" / "metrics.json").read_text())["mean"]


def test_tile_changes_no_score_of_validation_and_test(work):
    wide(work)
    for scope, tile in (("unet", "0"), ("tiles", "64")):
        assert main.main([*SMALL, "--scope", scope, "--num_epoch", "2", "--tile", tile, "--amp", "off"]) == 0
        assert main.main(["--mode", "test", "--gpu_ids", "-1", "--scope", scope, "--tile", tile, "--amp", "off"]) == 0
    assert scores_of(work, "tiles") == pytest.approx(scores_of(work, "unet"), abs=1e-6)
    whole, tiles = curves(work), curves(work, "tiles")
    for name in ("loss/val", "pixel_error", "iou/1"):
        assert tiles[name] == [(epoch, pytest.approx(value, abs=1e-6)) for epoch, value in whole[name]]


def test_background_of_three_classes_scores_and_writes_objects_with_a_class(work, capsys):
    wide(work, 3, 8)
    assert main.main([*SMALL, "--nch_ker", "4", "--num_epoch", "20", "--batch_size", "1", "--lr", "1e-2"]) == 0
    assert main.main(["--mode", "test", "--gpu_ids", "-1", "--background", "2"]) == 0
    assert scores_of(work, "unet")["object_f1"] > 0.2
    said = capsys.readouterr().out
    assert "background is 2" in said and re.search(r"^label +0 +1 +2\n0 +[\d.]+ ", said, re.MULTILINE)
    image = SampleFile(work / "datasets" / "em" / "test" / "0.npy").open()[0]
    np.save("in.npy", np.ascontiguousarray(image[..., 0]))
    predict = ["--mode", "predict", "--gpu_ids", "-1", "--input", "in.npy", "--output", "out.npy"]
    assert main.main([*predict, "--what", "mask,cells", "--background", "2"]) == 0
    mask, cells = np.load("out-mask.npy"), np.load("out-cells.npy")
    assert np.array_equal(cells == 0, mask == 2)
    table = [line.split(",") for line in (work / "out-cells.csv").read_text().splitlines()]
    assert table[0][:5] == ["image", "section", "object", "class", "area_px"]
    rows = [[row[0], *row[2:5]] for row in table[1:]]
    assert [int(row[1]) for row in rows] == list(range(1, cells.max() + 1))
    for _, number, name, area in rows:
        assert set(np.unique(mask[cells == int(number)])) == {int(name)} and (cells == int(number)).sum() == int(area)
    said = capsys.readouterr().out
    assert (
        f"{sum(row[2] == '0' for row in rows)} of class 0, " in said
        and " in 1 image; " in said
        and "background is 2" in said
    )


def test_background_refuses_what_is_no_class_and_a_table_that_is_not_ours(work, fails):
    wide(work, 3, 8)
    assert "choose from 0, 1, 2" in fails(main.main, [*SMALL, "--background", "sky"])
    assert main.main([*SMALL, "--num_epoch", "1"]) == 0
    assert "choose from 0, 1, 2" in fails(main.main, ["--mode", "test", "--gpu_ids", "-1", "--background", "sky"])
    np.save("in.npy", np.zeros((32, 32), np.uint8))
    (work / "out.csv").write_text("my notes")
    predict = ["--mode", "predict", "--gpu_ids", "-1", "--input", "in.npy", "--output", "out.npy", "--what", "cells"]
    assert "out.csv" in fails(main.main, predict)
    assert (work / "out.csv").read_text() == "my notes"
