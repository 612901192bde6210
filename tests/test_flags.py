"""Flags and config files as they are typed, and what is said of a typing error."""

from pathlib import Path

import pytest

from fooddiff.commands import eval as eval_command
from fooddiff.commands import flags, scripts
from fooddiff.runs.load import class_ids, stored_weights

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CONFIG = """
from ml_collections import ConfigDict

def get_config({}):
    return ConfigDict({{"seed": 1, "optimizer": {{"lr": 0.1, "name": "adam"}}, "betas": (0.9, 0.99)}})
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "base.py").write_text(CONFIG.format(""))
    (tmp_path / "recipes" / "digits.py").write_text("from recipes.base import get_config")
    (tmp_path / "recipes" / "with_variant.py").write_text(CONFIG.format("variant"))
    return str(tmp_path / "recipes" / "digits.py")


def said(capsys, function, *argv):
    """The error that a command ends with."""
    with pytest.raises(SystemExit) as stopped:
        function(list(argv))
    assert stopped.value.code in (1, 2)
    printed = capsys.readouterr()
    assert len(printed.err.strip().splitlines()) == 1
    return printed.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--workdri=x"], "no flag --workdri: did you mean --workdir?"),
        (["--workdir=x", "--per_clas", "3"], "no flag --per_clas: did you mean --per_class?"),
        (["--work=x"], "no flag --work"),
        (["--quite_another"], "no flag --quite_another (run_sample"),
        (["--config.seed=3"], "no flag --config.seed"),
        (["pizza"], "unexpected argument 'pizza'"),
    ],
)
def test_unknown_flags_are_named_with_the_nearest(capsys, monkeypatch, argv, message):
    monkeypatch.setattr("sys.argv", ["run_sample.py"])
    assert message in said(capsys, scripts.sample, *argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["imges", "a", "b"], "'imges' is none of run, sweep"),
        (["imges", "a", "b"], "did you mean images?"),
        (["images", "a", "b", "--reszie=tf1"], "no flag --reszie: did you mean --resize?"),
        (["images", "a", "b", "--resize=tf"], "did you mean tf1?"),
        (["images", "a", "b", "--metrics=fd,kdd"], "'kdd' is none of fd, kd, pr, is: did you mean kd?"),
        (["images", "a", "b", "--features=2047"], "did you mean 2048?"),
        (["images", "a", "b", "--seed=-1"], "'-1' is no integer from 0 to 4294967295"),
        (["images", "a", "b", "--seed=4294967296"], "is no integer from 0 to 4294967295"),
        (["run", "--workdir=x", "--interval=-4:4"], "'-4:4' is no interval, expected LOW,HIGH"),
        (["run", "--workdir=x", "--interval=-4,inf"], "'-4,inf' is no interval"),
        (["sweep", "--workdir=x", "--intervals=all,-4"], "'-4' is no interval"),
        (["sweep", "--workdir=x", "--guidances=1,x"], "'1,x' is no list of numbers"),
    ],
)
def test_unknown_values_are_named_with_the_nearest(capsys, argv, message):
    assert message in said(capsys, eval_command.main, *argv)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.optimizer.lrr=1", "no field optimizer.lrr: did you mean optimizer.lr?"),
        ("--config.optimiser.name=adam", "no field optimiser.name: did you mean optimizer.name?"),
        ("--config.lr=1", "no field lr: did you mean optimizer.lr?"),
        ("--config.seed.more=1", "no field seed.more"),
        ("--config.optimizer.lr=fast", "could not convert string to float: 'fast'"),
    ],
)
def test_unknown_fields_are_named_with_the_nearest(config, override, message):
    with pytest.raises(ValueError, match="config") as error:
        flags.load_config(config, [override])
    assert message in str(error.value)


def test_the_home_folder_is_known_in_values(config, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = flags.Parser()
    parser.add_argument("--config")
    flags.add_run(parser)
    given = flags.parse(parser, [f"--config={config}", "--workdir=~/run", "--weights=~ema", "--config.name=~"])
    assert (str(given.workdir), given.weights, given.overrides) == ("/home/me/run", "~ema", ["--config.name=/home/me"])


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.py")), ids=lambda file: file.stem)
def test_every_printed_field_gives_its_own_value_back(file, capsys):
    made = flags.load_config(str(file), [])
    flags.print_fields(made)
    again = flags.load_config(str(file), capsys.readouterr().out.splitlines())
    assert again.to_dict() == made.to_dict()


def test_none_is_nothing_and_no_text():
    made = flags.load_config(str(CONFIGS / "digits.py"), ["--config.data.cache_dir=None", "--config.sample.steps=None"])
    assert (made.data.cache_dir, made.sample.steps) == (None, None)


def test_a_file_that_is_no_python_is_no_config(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is no config file, which is Python"):
        flags.load_config(str(tmp_path / "config.json"), [])


def test_unknown_config_files_are_named_with_the_nearest(config):
    with pytest.raises(FileNotFoundError, match=r"digit.py: did you mean .*digits.py\?"):
        flags.load_config(config.replace("digits", "digit"), [])
    with pytest.raises(ValueError, match="takes no argument, got 'tiny'"):
        flags.load_config(f"{config}:tiny", [])


def test_a_config_imports_its_neighbours_wherever_it_is(config):
    loaded = flags.load_config(config, ["--config.optimizer.lr=0.5", "--config.seed", "7", "--config.betas=(0.8,0.9)"])
    assert (loaded.optimizer.lr, loaded.seed, loaded.betas) == (0.5, 7, (0.8, 0.9))
    assert flags.load_config(config.replace("digits", "with_variant") + ":big", []).seed == 1


def test_helpconfig_prints_fields_as_flags(config, capsys):
    scripts.train([f"--config={config}", "--config.seed=5", "--helpconfig"])
    assert capsys.readouterr().out.splitlines() == [
        "--config.betas=(0.9, 0.99)",
        "--config.optimizer.lr=0.1",
        "--config.optimizer.name=adam",
        "--config.seed=5",
    ]


@pytest.mark.parametrize("command", [["run"], ["sweep"], ["follow"], ["bpd"], []])
def test_help_is_grouped_and_its_usage_is_one_line(capsys, command):
    with pytest.raises(SystemExit):
        eval_command.main([*command, "--help"])
    usage, empty, *_ = capsys.readouterr().out.splitlines()
    assert usage.startswith(f"usage: {' '.join(['python -m fooddiff.eval', *command])} ")
    assert empty == ""


def test_unknown_classes_and_weights_are_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"no class 'Ice cream': the model knows .*: did you mean ice_cream\?"):
        class_ids(("pizza", "ice_cream"), ("pizza", "Ice cream"))
    with pytest.raises(ValueError, match=r"no weights 'rw'.*did you mean raw\?"):
        stored_weights("rw", {"rates": (0.99,), "power_lengths": ()})
