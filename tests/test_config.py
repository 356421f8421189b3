import re
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT

import description
import main
import model
import samples
from arguments import PROGRAMS, parse
from config import OF_OBJECTS, PHANTOM, WHAT, Config, DatabaseFlags, DisplayFlags
from images import writers
from prediction import export, outputs
from sources import database, phantom
from training import best, losses, optim
from training.augment import Augmentation
from utils import FlagError, UserError


def test_config_refuses_a_misspelled_field():
    with pytest.raises(TypeError):
        Config(nch_kerr=4)


def test_help_imports_no_torch():
    code = "import sys, main\ntry: main.main(['--help'])\nexcept SystemExit as e: print(e.code, 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "0 False"
    assert "--nch_ker" in out


@pytest.mark.parametrize("table", PROGRAMS.values())
def test_help_has_eight_flags_and_help_all_has_every_one(table, capsys):
    def listed(*argv):
        with pytest.raises(SystemExit) as error:
            parse(table, [*argv], None)
        assert error.value.code == 0
        out = capsys.readouterr().out
        return re.findall(r"^  --(\w+)", out, re.MULTILINE), out

    names = [item.name for item in fields(table)]
    first, out = listed("--help")
    assert len(first) == 8 and {*first} <= {*names}
    assert len(names) == 8 or f"\n{len(names) - 8} more flags: python" in out
    assert listed("-h", "all")[0] == names


def test_next_step_is_quoted_and_keeps_names_and_folders(monkeypatch):
    made = DatabaseFlags(name_data="my cells", dir_data="~/d", seed=3)
    expected = "next: python main.py --mode train --name_data 'my cells' --dir_data '~/d' --nch_ker 16"
    assert made.next_step(Config, mode="train", nch_ker=16) == expected
    config = Config(scope="a", dir_result="out", dir_log="log", gpu_ids="-1", nch_ker=8, flip=False)
    monkeypatch.setattr(sys, "argv", ["../unet/main.py", "--x"])
    assert config.next_step(Config, mode="test") == (
        "next: python ../unet/main.py --mode test --scope a --dir_log log --dir_result out --gpu_ids -1"
    )
    assert config.next_step(DisplayFlags) == "next: python ../unet/display_result.py --scope a --dir_result out"


def test_choices_of_a_flag_are_those_that_are_implemented():
    choices = {item.name: set(item.metadata["choices"]) for item in fields(Config)}
    assert choices["mode"] == main.MODES.keys()
    assert choices["split"] == set(samples.SPLITS)
    assert choices["normalize"] == set(description.NORMALIZE) - {"legacy"}
    assert choices["dtype"] == outputs.PROBABILITY.keys()
    assert list(WHAT) == [*outputs.OUTPUTS]
    assert set(OF_OBJECTS) == {name for name, output in outputs.OUTPUTS.items() if output.of_objects}
    assert choices["compression"] == writers.TIFF_WRITERS.keys() | {"auto"}
    assert choices["loss"] == losses.LOSSES.keys() | {"auto"}
    assert choices["norm"] == model.NORMS.keys()
    assert choices["pool"] == model.POOLS.keys()
    assert choices["init"] == model.INITS.keys()
    assert choices["optim"] == optim.OPTIMS.keys()
    assert choices["best_score"] == best.SCORES.keys() > set(best.FALLING)
    assert choices["schedule"] == optim.SCHEDULES.keys()
    assert choices["format"] == export.FORMATS.keys()
    assert database.CLASS_NAMES.keys() == phantom.PHANTOMS.keys() == set(PHANTOM)


def test_augmentation_flags_are_its_fields():
    flags = {item.name for item in fields(Config) if item.metadata["group"] == "augmentation"}
    others = {"crop", "num_class", "is_partial", "keeps_unchanged"}
    assert flags == {item.name for item in fields(Augmentation)} - others


def test_augmentation_is_off_without_flags():
    on = [name for name, value in vars(Augmentation((32, 32), 2)).items() if value]
    assert on == ["crop", "num_class", "zoom", "elastic_share", "elastic_grid"]


@pytest.mark.parametrize("argv", [["--no_such_flag"], ["--lr", "fast"], ["--mode", "dance"], ["--nch_k", "4"]])
def test_parse_ends_with_one_line_and_status_2_after_a_bad_flag(argv, capsys):
    with pytest.raises(SystemExit) as error:
        main.main(argv)
    assert error.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


WRONG = [{"batch_size": 0}, {"lr": -1.0}, {"gpu_ids": "cuda"}, {"norm": "lnorm"}, {"w0": float("inf")}, {"blur": 30.0}]
WRONG += [{"sigma": 1e-300}, {"sigma": 11.0}, {"gpu_ids": "9" * 5000}]
NUMBERS = [item.name for item in fields(Config) if type(item.default) in (int, float)]


@pytest.mark.parametrize("values", WRONG)
def test_rule_refuses_a_value_beyond_it(values):
    with pytest.raises(FlagError, match=next(iter(values))):
        Config(**values)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [1e300, 10**40, -(10**40), float("nan")])
def test_rule_of_every_number_has_bounds(name, value):
    with pytest.raises(FlagError, match=f"--{name} .*must"):
        Config(**{name: value})


def test_rule_ends_the_program_with_status_2(fails):
    assert "--batch_size 0: must lie in [1, 1048576]" in fails(main.main, ["--batch_size", "0"], status=2)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--input", "x.tif", "--output", "y.tif"],
            "--input x.tif: applies to --mode predict: add it, or leave --input",
        ),
        (["--input", "a.tif", "b.tif"], "--input a.tif b.tif: applies"),
        (["--input", *"abcd"], "--input a b c ...: applies"),
        (["--output", "y.tif"], "--mode predict or export: add it"),
        (["--loss", "bce", "--balance"], "--balance on: applies to --loss wbce"),
        (["--epoch", "1", "--train_continue", "off"], "--epoch 1: applies to --train_continue on: add it"),
        (["--mode", "test", "--link", "0.3"], "--link 0.3: applies to --mode predict: change --mode test"),
        (["--mode", "predict", "--format", "torchscript"], "--format torchscript: applies to --mode export: change"),
    ],
)
def test_mode_refuses_a_flag_without_effect_and_the_checkpoints_stay(argv, words, trained, work, fails):
    assert words in fails(main.main, ["--gpu_ids", "-1", *argv], status=2)
    assert not (work / "checkpoints" / "unet" / "em" / "earlier-1").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../em", "a\\b", "a\nb"])
@pytest.mark.parametrize("flag", ["scope", "name_data"])
def test_scope_and_name_data_refuse_what_is_no_folder_name(flag, name, fails):
    with pytest.raises(UserError):
        Config(**{flag: name})
    assert f"--{flag}" in fails(main.main, [f"--{flag}", name], status=2)


def test_switch_without_a_value_is_on():
    assert parse(Config, ["--train_continue", "--tta", "off"], None).train_continue
    assert parse(DatabaseFlags, ["--objects", "--name_data", "a"], None).objects


def test_epoch_flag_is_a_number_or_best(capsys):
    assert [parse(Config, ["--mode", "test", "--epoch", text], None).epoch for text in ("7", "best")] == [7, "best"]
    assert Config(mode="test", epoch="best").as_typed()["--epoch"] == "best"
    with pytest.raises(FlagError, match="--epoch worst: must be best"):
        Config(epoch="worst")
    with pytest.raises(SystemExit):
        parse(Config, ["--epoch", "worst"], None)
    assert "'worst' is neither a number nor best" in capsys.readouterr().err


def test_parse_reads_the_commands_of_pytorch_unet():
    argv = (
        "--mode train --scope unet --name_data em --dir_data ./datasets --dir_log ./log"
        " --dir_checkpoint ./checkpoints --gpu_ids 0,1 --train_continue on --num_epoch 300 --batch_size 4 --lr_G 1e-4"
        " --beta1 0.5 --optim rmsprop --norm inorm --nch_ker 64 --ny_load 512 --nx_load 512 --num_freq_disp 5"
        " --num_freq_save 50 --seed 1 --num_workers 8"
    )
    config = parse(Config, argv.split(), None)
    assert (config.lr, config.train_continue, config.gpu_ids, config.nx_load) == (1e-4, True, "0,1", 512)
    assert parse(Config, ["--gpu_ids", "-1", "--train_continue", "off"], None).gpu_ids == "-1"
