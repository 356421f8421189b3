"""The documentation: flags.md lists every flag, commands parse, links lead somewhere, the map shows what is there."""

import re
import shlex
import subprocess
from dataclasses import fields

import pytest
from conftest import ROOT, SMALL
from test_words import PYTORCH_UNET

import main
import run_make_database
from arguments import OF_PYTORCH_UNET, parse
from config import Config, DatabaseFlags, DisplayFlags
from evaluation.hints import HINTS
from flags import SWITCH

TABLES = {"main.py": Config, "run_make_database.py": DatabaseFlags, "display_result.py": DisplayFlags}
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.mark.parametrize("program", TABLES)
def test_the_page_of_flags_lists_each_with_its_group_and_default(program):
    parts = re.split(r"^## ", (ROOT / "docs/flags.md").read_text("utf-8"), flags=re.MULTILINE)
    section = next(part for part in parts if part.startswith(f"{program}\n"))
    listed = [
        (group, names, default.strip("` "))
        for group, rows in re.findall(r"^### (.+)\n((?:(?!###).*\n?)*)", section, re.MULTILINE)
        for names, default in re.findall(r"^\| (`--.+?`) \| (.*?) ?\|", rows, re.MULTILINE)
    ]
    flags = []
    for item in fields(TABLES[program]):
        default = SWITCH[not item.default] if isinstance(item.default, bool) else item.default
        names = ", ".join(f"`--{name}`" for name in (item.name, item.metadata.get("alias")) if name)
        flags.append((item.metadata["group"], names, "" if default is None or default != default else str(default)))
    assert listed == flags


def test_the_page_of_pytorch_unet_lists_all_of_its_flags_and_those_that_are_refused():
    section = (ROOT / "docs/pytorch-unet.md").read_text("utf-8").partition("## Flags\n")[2].partition("\n## ")[0]
    listed = {name: row for row in section.splitlines() for name in re.findall(r"`--(\w+)`", row.split(" | ")[0])}
    assert listed.keys() == {*PYTORCH_UNET}
    assert {name for name, row in listed.items() if "refused" in row} == OF_PYTORCH_UNET.keys()


def test_the_map_of_the_readme_names_files_and_folders_that_are_there():
    section = (ROOT / "README.md").read_text("utf-8").partition("## The code\n")[2].partition("\n## ")[0]
    named = re.findall(r"^    ([\w.]+/?) ", section, re.MULTILINE)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_hints_are_those_of_the_readme():
    text = re.sub(r"\s+", " ", (ROOT / "README.md").read_text("utf-8"))
    listed = re.findall(r"- \*\*([^*]+)\*\*: (.*?)\.(?= -| `tensorboard)", text)
    assert [(symptom.lower(), advice) for symptom, advice in listed] == [(a.lower(), b) for a, b in HINTS.values()]


@each_page
def test_the_commands_of_a_page_parse(page):
    for line in re.sub(r"\\\n\s*", "", page.read_text("utf-8")).splitlines():
        found = re.match(rf"    .*?\b({'|'.join(map(re.escape, TABLES))}) (--.*)", line)
        if found:
            arguments = re.sub(r"\s[#(|>&].*", "", found[2])
            parse(TABLES[found[1]], shlex.split(arguments), None)


def test_the_commands_of_the_loop_run(work):
    """In the order of the page, with small networks and images."""
    text = (ROOT / "docs/loop.md").read_text("utf-8").partition("## Where to annotate next")[0]
    programs = {"main.py": main.main, "run_make_database.py": run_make_database.main}
    train = [*SMALL, "--max_minutes", "0", "--num_epoch", "1"]
    for line in re.findall(r"^    (.+)", text, re.MULTILINE):
        words = shlex.split(line)
        if words[0] != "python":
            subprocess.run(line, shell=True, check=True)
            continue
        more = train if "train" in words else ["--size", "96"] if "--synthetic" in words else []
        assert programs[words[1]]([*words[2:], *more, *(["--gpu_ids", "-1"] if words[1] == "main.py" else [])]) == 0
    sets = {split: len(list((work / f"datasets/loop/{split}").glob("0000?.npy"))) for split in ("train", "val", "test")}
    assert sets == {"train": 7, "val": 1, "test": 1}
    assert len(list((work / "segmented/labels").glob("*.png"))) == 7 and (work / "segmented/index.html").exists()


@each_page
def test_the_links_of_a_page_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text("utf-8")):
        file = page.parent / target if target else page
        assert file.exists(), target
        titles = re.findall(r"^#+ (.*)", file.read_text("utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
