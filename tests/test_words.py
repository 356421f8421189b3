"""An unknown name is answered with the nearest that there is, and `~` is the home folder."""

import shutil

import numpy as np
import pytest
import tifffile
from conftest import SMALL

import display_result
import main
import run_make_database
from arguments import OF_PYTORCH_UNET, OTHER_WORDS, PATHS, PROGRAMS, parse
from config import Config, DatabaseFlags, DisplayFlags

# all flags of pytorch-UNET, as its main.py lists them
PYTORCH_UNET = [
    "gpu_ids", "dir_checkpoint", "dir_log", "dir_result", "dir_data", "mode", "train_continue", "scope", "norm",
    "name_data", "num_epoch", "batch_size", "lr_G", "optim", "beta1", "ny_in", "nx_in", "nch_in", "ny_load",
    "nx_load", "nch_load", "ny_out", "nx_out", "nch_out", "nch_ker", "data_type", "num_freq_disp", "num_freq_save",
]  # fmt: skip


@pytest.fixture
def refuses(capsys):
    """Runs a command that the parser must refuse, and returns its one line."""

    def run(program, *argv):
        with pytest.raises(SystemExit) as stop:
            program.main(list(argv))
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


@pytest.mark.parametrize(
    ("word", "flag"),
    [
        ("--epochs", "num_epoch"),
        ("--num_epochs", "num_epoch"),
        ("--num_ep", "num_epoch"),
        ("--batchsize", "batch_size"),
        ("--batch-size", "batch_size"),
        ("--learning_rate", "lr"),
        ("--gpu", "gpu_ids"),
        ("--max_minute", "max_minutes"),
        ("--data-dir", "dir_data"),
        ("--Scope", "scope"),
        ("-mode", "mode"),
        ("\u2013mode", "mode"),
    ],
)
def test_unknown_flag_is_answered_with_the_nearest(word, flag, refuses):
    assert f"{word}: did you mean --{flag}: see" in refuses(main, word, "3")
    assert f"{word}: did you mean --{flag}: see" in refuses(main, f"{word}=3")


def test_flag_of_pytorch_unet_is_ours_or_answered_with_ours(refuses):
    assert len(PYTORCH_UNET) == 28
    known = {*PROGRAMS["main.py"].__dataclass_fields__, "lr_G"}
    assert [name for name in PYTORCH_UNET if name not in known] == [n for n in PYTORCH_UNET if n in OF_PYTORCH_UNET]
    sizes = ["--ny_in", "512", "--nx_in", "512", "--ny_out", "512", "--nx_out", "512"]
    line = refuses(main, *sizes, "--nch_load", "1", "--data_type", "float32")
    for name, ours in (("ny_in", "ny_load"), ("nx_out", "nx_load"), ("nch_load", "nch_in"), ("data_type", "normalize")):
        assert f"--{name}: a flag of pytorch-UNET" in line and f"--{ours}" in line


def test_flag_of_another_program_names_it(refuses):
    assert "--synthetic: a flag of run_make_database.py" in refuses(main, "--synthetic", "3")
    assert "--nch_ker: a flag of main.py" in refuses(run_make_database, "--nch_ker", "4")
    assert "--output: did you mean --save" in refuses(display_result, "--output", "a.png")
    assert "--images: did you mean --input; --masks: did you mean --label" in refuses(
        run_make_database, "--images", "a", "--masks", "b"
    )
    assert "a value without a flag" in refuses(main, "train")
    assert "--zzz: no flag is like it" in refuses(main, "--zzz", "-1")


def test_other_words_stand_for_flags_that_there_are():
    flags = {name for table in PROGRAMS.values() for name in table.__dataclass_fields__}
    assert OTHER_WORDS.keys() <= flags >= {*PATHS}


def test_missing_database_or_scope_names_the_nearest(trained, work, fails):
    test = ["--mode", "test", "--gpu_ids", "-1"]
    assert "did you mean --name_data em?" in fails(main.main, [*SMALL, "--name_data", "EM"])
    assert "did you mean --name_data em?" in fails(main.main, [*test, "--name_data", "EM"])
    assert "did you mean --scope unet?" in fails(main.main, [*test, "--scope", "unett"])
    assert "did you mean --scope unet --name_data em?" in fails(
        main.main, [*test, "--scope", "Unet", "--name_data", "e"]
    )
    assert "did you mean --name_data em?" in fails(run_make_database.main, ["--name_data", "EM"])
    assert "there is em: run run_make" in fails(main.main, [*SMALL, "--name_data", "nuclei"])
    shutil.rmtree(work / "checkpoints")
    assert "no checkpoint in checkpoints/unet/EM: run --mode" in fails(main.main, [*test, "--name_data", "EM"])
    (work / "results/unet/em/images").mkdir(parents=True)
    assert "did you mean --name_data em?" in fails(display_result.main, ["--name_data", "EM"])
    assert "no result images in results/unet/em/images: run" in fails(display_result.main, [])


def test_missing_class_channel_or_series_names_the_nearest(trained, work, fails):
    predict = ["--mode", "predict", "--gpu_ids", "-1", "--input", "a.tif", "--output", "b.tif"]
    pixels = np.zeros((2, 32, 32), np.uint8)
    tifffile.imwrite("a.tif", pixels, ome=True, metadata={"axes": "CYX", "Channel": {"Name": ["DAPI", "GFP"]}})
    assert "--background membran: no such class: did you mean membrane? Else choose from membrane, cell" in fails(
        main.main, [*predict, "--background", "membran"]
    )
    assert "no channel gfp2: it has 2, 0 (DAPI), 1 (GFP): did you mean GFP?" in fails(
        main.main, [*predict, "--channel", "gfp2"]
    )
    make = ["--input", str(trained / "train-volume.tif"), "--label", str(trained / "train-labels.tif")]
    make += ["--name_data", "b", "--class_names", "membrane,cell"]
    assert "--background cel: no class has that value: did you mean 255? Else choose from 0; 255" in fails(
        run_make_database.main, [*make, "--background", "cel"]
    )


def test_tilde_at_the_beginning_of_a_path_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    argv = "--mode predict --output=~/p.tif --dir_result=~/results --dir_data ~ --dir_log ./~ --scope ~ --input ~/a a~"
    config = parse(Config, argv.split(), None)
    assert (config.output, config.dir_result) == (f"{tmp_path}/p.tif", f"{tmp_path}/results")
    assert (config.dir_data, config.dir_log, config.scope) == (str(tmp_path), "./~", "~")
    assert config.input == (f"{tmp_path}/a", "a~")
    assert parse(DatabaseFlags, ["--input=~/i/", "--label=none"], None).input == f"{tmp_path}/i/"
    assert parse(DisplayFlags, ["--save=~/f.png"], None).save == f"{tmp_path}/f.png"


def test_tilde_of_an_output_is_the_home_folder(trained, work, monkeypatch):
    monkeypatch.setenv("HOME", str(work / "home"))
    monkeypatch.setenv("USERPROFILE", str(work / "home"))
    argv = "--mode predict --gpu_ids -1 --tta off --input datasets/em/train-volume.tif --section 0 --output=~/p.tif"
    assert main.main(argv.split()) == 0
    assert (work / "home" / "p.tif").is_file() and not (work / "~").exists()


def test_init_from_of_another_file_never_advises_to_delete_it(work, database, fails):
    for name, content in (("notes.csv", b"a,b\n1,2\n"), ("cut.pth", b"PK\x03\x04"), ("empty.pth", b"")):
        (work / name).write_bytes(content)
        line = fails(main.main, [*SMALL, "--init_from", name])
        assert f"{name}: " in line and ("choose another file" in line or "use a checkpoint" in line)
        assert "delete" not in line and "remove" not in line


@pytest.mark.parametrize(
    "name", ["..tif", "....tif", "..npy", ".tif", " .tif", "x/..tif", ".ome.tif", "out.tif.", "out "]
)
def test_output_that_is_only_an_ending_is_one_line(name, trained, work, fails):
    argv = ["--mode", "predict", "--gpu_ids", "-1", "--input", "datasets/em/train-volume.tif", "--output", name]
    assert f"--output {name}: must have a name before its ending" in fails(main.main, argv, status=2)
    assert f"--save {name}: must have a name" in fails(display_result.main, ["--save", name], status=2)
    assert {path.name for path in work.iterdir()} == {"checkpoints", "datasets", "log"}


def test_output_may_begin_with_a_dot_and_hold_several(trained, work):
    argv = [
        "--mode",
        "predict",
        "--gpu_ids",
        "-1",
        "--tta",
        "off",
        "--input",
        "datasets/em/train-volume.tif",
        "--section",
        "0",
        "--output",
    ]
    for name in (".out.tif", "a..tif", "..x/.y.npy"):
        assert main.main([*argv, name]) == 0
        assert (work / name).is_file()
