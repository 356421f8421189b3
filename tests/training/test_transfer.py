import shutil

import numpy as np
import pytest
import torch
from conftest import SHARED, SMALL, checkpoint_of, needs_golden, same, write_info

import main
from model import UNet, init_weights
from samples import write_sample
from training.transfer import copy_weights

STILL = [*SMALL, "--lr", "1e-30", "--num_epoch", "1"]  # no step changes a weight
OWN = "checkpoints/unet/em"


def network(*arguments, seed=0, **options):
    net = UNet(*arguments, **options)
    init_weights(net, "kaiming", seed)
    return net


def test_init_from_begins_with_the_averaged_weights_of_another(database, work, capsys):
    assert main.main([*SMALL, "--lr", "0.1", "--num_epoch", "3"]) == 0
    assert main.main([*STILL, "--scope", "new", "--init_from", OWN, "--seed", "5"]) == 0
    source, new = checkpoint_of(work, 3), checkpoint_of(work, 1, "new")
    assert "1,471 of 1,471 weights taken from checkpoints/unet/em/model_epoch0003.pth\n" in capsys.readouterr().out
    names = [name for name in source.net if name.endswith(("weight", "bias"))]
    assert not same(source.net, source.average["net"])
    for state in (new.net, new.average["net"]):
        assert same({name: source.average["net"][name] for name in names}, {name: state[name] for name in names})
    assert new.optim["state"][0]["step"] == 2 and new.average["num_step"] == 2  # of this run
    assert new.config["init_from"] == OWN


def test_init_from_copies_statistics_so_the_first_validation_is_the_same(database, work):
    assert main.main([*SMALL, "--lr", "0.1", "--num_epoch", "3"]) == 0
    net, source = network(1, 1, 2, num_level=2), checkpoint_of(work, 3).network("a.pth")
    assert copy_weights(net, source) == (1471, [])
    assert same(net.state_dict(), source.state_dict())


def test_copy_weights_leaves_first_and_last_layer_for_other_channels():
    net, source = network(3, 4, 2), network(1, 1, 2, seed=1)
    num_taken, others = copy_weights(net, source)
    assert others == ["encoders.0.0.conv", "fc"]
    missing = ("encoders.0.0.conv.weight", "fc.weight", "fc.bias")
    own, drawn, theirs = net.state_dict(), network(3, 4, 2).state_dict(), source.state_dict()
    assert all(value.equal((drawn if name in missing else theirs)[name]) for name, value in own.items())
    assert num_taken == sum(p.numel() for name, p in net.named_parameters() if name not in missing)


@pytest.mark.parametrize(("ours", "theirs"), [(4, 3), (3, 4), (2, 5), (1, 2)])
def test_copy_weights_shares_the_levels_from_the_top(ours, theirs):
    net, source = network(1, 1, 2, num_level=ours), network(1, 1, 2, num_level=theirs, seed=1)
    _, others = copy_weights(net, source)
    common = min(ours, theirs)
    for level in range(common):
        assert same(net.encoders[level].state_dict(), source.encoders[level].state_dict())
    for level in range(common):
        one, other = net.decoders[ours - 1 - level], source.decoders[theirs - 1 - level]
        assert same(one.state_dict(), other.state_dict())
    assert same(net.fc.state_dict(), source.fc.state_dict())
    deeper, shallower = (net, source) if ours > theirs else (source, net)
    assert same(shallower.bottom[0].state_dict(), deeper.encoders[common][0].state_dict())
    levels = [f"decoders.{index}" for index in range(ours - common)] + ["bottom.1"]
    assert {name.rpartition(".")[0].partition(".convs")[0] for name in others} >= set(levels)


def test_copy_weights_fits_convolutions_of_another_norm_and_no_bias_alone():
    net, source = network(1, 1, 2, norm="inorm"), network(1, 1, 2, norm="bnorm", seed=1)
    assert copy_weights(net, source)[1] == []
    assert net.bottom[0].conv.weight.equal(source.bottom[0].conv.weight) and not net.bottom[0].conv.bias.any()
    assert copy_weights(network(1, 1, 3), source)[0] == 0  # though the bias of the last layer has one value in both


def test_init_from_trains_a_network_of_other_channels_and_classes(trained, work, capsys):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (work / "datasets" / "three" / split).mkdir(parents=True)
        label = rng.integers(0, 3, (4, 4), np.uint8).repeat(8, 0).repeat(8, 1)
        image = np.stack([label == 1, label == 2], -1).astype(np.uint8)
        write_sample(work / "datasets" / "three" / split / "0.npy", image, label)
    write_info(work / "datasets" / "three", 3)
    flags = [*SMALL, "--num_epoch", "1", "--name_data", "three", "--init_from", f"{OWN}/model_epoch0001.pth"]
    assert main.main(flags) == 0
    assert "drawn at random: encoders.0.0.conv, fc\n" in capsys.readouterr().out


@needs_golden
def test_init_from_takes_a_checkpoint_of_the_original(database, work, capsys):
    source = SHARED / "golden" / "upstream" / "bnorm_model_epoch0003.pth"
    assert main.main([*STILL, "--num_level", "4", "--init_from", str(source)]) == 0
    assert "23,175 of 23,175 weights" in capsys.readouterr().out
    theirs = torch.load(source)["netG"]
    assert checkpoint_of(work, 1).net["fc.weight"].equal(theirs["fc.conv.weight"])


@pytest.mark.parametrize(
    ("path", "flags", "words"),
    [
        (f"{OWN}/model_epoch0001.pth", ["--nch_ker", "3"], "none of its weights fit"),
        ("nix.pth", [], "no such file"),
        ("datasets", [], "no checkpoint there"),
        ("datasets/em/dataset.json", [], "not a checkpoint: use a checkpoint that"),
    ],
)
def test_init_from_refuses_what_is_no_start_in_one_line(trained, work, fails, path, flags, words):
    line = fails(main.main, [*SMALL, "--num_epoch", "1", "--scope", "new", *flags, "--init_from", path])
    assert words in line and path in line
    assert not (work / "checkpoints" / "new").exists()


def test_init_from_is_for_a_training_that_begins(trained, work, capfd, fails):
    shutil.copytree(work / OWN, work / "other")
    line = fails(main.main, [*SMALL, "--num_epoch", "3", "--init_from", "nix"])
    assert "did not begin with it: leave it out" in line and "--train_continue off" in line
    again = ["--scope", "new", "--init_from", "other", "--num_epoch"]
    assert main.main([*SMALL, *again, "1"]) == 0
    assert "taken from other" in capfd.readouterr().out
    shutil.rmtree(work / "other")
    assert main.main([*SMALL, *again, "2"]) == 0
    assert "taken" not in capfd.readouterr().out and checkpoint_of(work, 2, "new").epoch == 2


def test_init_from_left_out_on_resuming_is_no_change_of_flags(trained, work, capsys):
    assert main.main([*STILL, "--scope", "new", "--init_from", OWN]) == 0
    capsys.readouterr()
    assert main.main([*STILL, "--scope", "new", "--num_epoch", "2", "--train_continue", "on"]) == 0
    assert "note: --init" not in capsys.readouterr().out
