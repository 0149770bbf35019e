"""Config files: what they may say, how they build on each other, and what mistakes are told."""

import re
from functools import partial
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field, field_validator, model_validator

from data_prep.download.schema import DownloadConfig
from data_prep.schema import DataConfig
from gengram_megatron.config.layout import check_layout
from gengram_megatron.config.load import dump_config, load_config
from gengram_megatron.config.schema import Config, Section
from gengram_megatron.errors import UserError
from gengram_megatron.sweep.runs import read_sweep

RIGHT = """\
run: {dir: runs/test}
model:
  hidden_size: 64
  num_layers: 12
  num_attention_heads: 4
  ffn_hidden_size: 128
  seq_length: 64
data: {path: datasets/test}
optimizer:
  lr: 1e-4
train:
  global_batch_size: 8
  steps: 2
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes a file of a folder that is the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes, name: str = "run.yaml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def problems(path: Path, words: list[str] | None = None) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(path, words or [], Config)
    return str(caught.value).splitlines()


def assert_says(problem: str, expected: str) -> None:
    """Compares the place, the suggestion, and the keys and values that are named; the words between
    them are free."""
    place, _, rest = expected.partition(": ")
    what, _, suggestion = rest.partition("; ")
    assert problem.startswith(f"{place}: ")
    assert suggestion in problem
    for named in re.findall(r"\w+\.[\w.]+|'[^']*'|\d\S*", what):
        assert named in problem


# What a file holds in place of a line of RIGHT, and the sentence that must come.
WRONG_FILES = {
    "wrong key": ("  lr: 1e-4", "  lrr: 1e-4", "run.yaml:10: there is no key optimizer.lrr; did you mean optimizer.lr?"),
    "key of another section": ("  steps: 2", "  steps: 2\n  lr: 3", "run.yaml:14: there is no key train.lr; did you mean optimizer.lr?"),
    "key without its section": ("optimizer:", "hidden_size: 3\noptimizer:", "run.yaml:9: there is no key hidden_size; did you mean model.hidden_size?"),
    "wrong section": ("optimizer:", "optimiser:", "run.yaml:9: there is no key optimiser; did you mean optimizer?"),
    "key of two sections": ("  steps: 2", "  steps: 2\n  interval: 3", "run.yaml:14: there is no key train.interval; did you mean checkpoint.interval or logging.interval?"),
    "key like nothing": ("run: {dir: runs/test}", "run: {dir: runs/test, zzz: 1}", "run.yaml:1: there is no key run.zzz; the keys of run are dir, seed"),
    "missing key": ("  num_layers: 12\n", "", "run.yaml:2: the key model.num_layers is missing; it must be a whole number greater than 0 (number of decoder layers)"),
    "missing section": ("data: {path: datasets/test}\n", "", "run.yaml: the key data is missing; it must be a group of keys (The training data: one data set written by `gengram-data build`, or a blend of several)"),
    "word for a number": ("num_layers: 12", "num_layers: twelve", "run.yaml:4: model.num_layers is the text 'twelve'; it must be a whole number greater than 0"),
    "quoted number": ("num_layers: 12", "num_layers: '12'", "run.yaml:4: model.num_layers is the text '12'; it must be a whole number greater than 0"),
    "fraction for a count": ("num_layers: 12", "num_layers: 1.5", "run.yaml:4: model.num_layers is 1.5; it must be a whole number greater than 0"),
    "true for a count": ("num_layers: 12", "num_layers: true", "run.yaml:4: model.num_layers is true; it must be a whole number greater than 0"),
    "too small": ("num_layers: 12", "num_layers: 0", "run.yaml:4: model.num_layers is 0; it must be a whole number greater than 0"),
    "infinite": ("lr: 1e-4", "lr: .inf", "run.yaml:10: optimizer.lr is .inf; it must be a number greater than 0"),
    "out of range": ("lr: 1e-4", "beta1: 1", "run.yaml:10: optimizer.beta1 is 1; it must be a number at least 0 and less than 1"),
    "not one of the choices": ("  seq_length: 64", "  seq_length: 64\n  attention: gpa", "run.yaml:8: model.attention is the text 'gpa'; it must be mha, gqa or mla"),
    "nothing in a section": ("optimizer:\n  lr: 1e-4", "optimizer:", "run.yaml:9: optimizer is null; it must be a group of keys"),
    "value for a section": ("optimizer:\n  lr: 1e-4", "optimizer: adam", "run.yaml:9: optimizer is the text 'adam'; it must be a group of keys"),
    "number for text": ("{path: datasets/test}", "{path: 3}", "run.yaml:8: data.path is 3; it must be text that is not empty, or null"),
    "no data": ("{path: datasets/test}", "{workers: 2}", "run.yaml:8: data: samples come from path or from blend, but neither is given; give one"),
    "path and blend": ("{path: datasets/test}", "{path: a, blend: [{path: b, weight: 1}]}", "run.yaml:8: data: samples come from path or from blend, but both are given; set one to null"),
    "empty blend": ("{path: datasets/test}", "{blend: []}", "run.yaml:8: data.blend is []; it must be a list of at least 1 entry, each entry a group of keys, or null"),
    "weight of nothing": ("{path: datasets/test}", "{blend: [{path: a, weight: 1},\n  {path: b, weight: 0}]}", "run.yaml:9: data.blend entry 2.weight is 0; it must be a number greater than 0"),
    "weight below nothing": ("{path: datasets/test}", "{blend: [{path: a, weight: -0.5}]}", "run.yaml:8: data.blend entry 1.weight is -0.5; it must be a number greater than 0"),
    "no weight": ("{path: datasets/test}", "{blend: [{path: a}]}", "run.yaml:8: the key data.blend entry 1.weight is missing; it must be a number greater than 0 (its share of the samples is its weight over the sum of all weights)"),
    "one name for two sets": ("{path: datasets/test}", "{blend: [{path: a/dna, weight: 1}, {path: c, weight: 1}, {path: b/dna/, weight: 1}]}", "run.yaml:8: data: entries 1 and 3 of blend are both named dna; give one of them another name"),
    "wrong entry of a list": ("  seq_length: 64", "  seq_length: 64\n  gengram:\n    layers: [2,\n      x]", "run.yaml:10: model.gengram.layers entry 2 is the text 'x'; it must be a whole number greater than 0"),
    "number for a list": ("  seq_length: 64", "  seq_length: 64\n  gengram: {layers: 3}", "run.yaml:8: model.gengram.layers is 3; it must be a list, each entry a whole number greater than 0"),
    "list too short": ("  seq_length: 64", "  seq_length: 64\n  gengram: {token_ids: [1]}", "run.yaml:8: model.gengram.token_ids is [1]; it must be a list of exactly 5 entries, each entry a whole number at least 0"),
    "old spelling of true": ("lr: 1e-4", "distributed: yes", "run.yaml:10: optimizer.distributed is the text 'yes'; it must be true or false"),
    "repeated key": ("  steps: 2", "  steps: 2\n  steps: 3", "run.yaml:14: the key steps is given twice, first at run.yaml:13; keep one of them"),
    "key that is a number": ("  steps: 2", "  steps: 2\n  3: 3", "run.yaml:14: a key must be a word, not '3'"),
    "key that is a list": ("  steps: 2", "  steps: 2\n  [3]: 3", "run.yaml:14: a key must be a word, not a list or a group"),
    "open bracket": ("  steps: 2", "  steps: [2", "run.yaml:14: this is not valid YAML: expected ',' or ']', but got '<stream end>'"),
    "tab": ("  steps: 2", "\tsteps: 2", "run.yaml:13: this is not valid YAML: found character '\\t' that cannot start any token"),
    "python tag": ("  steps: 2", "  steps: !!python/name:os.system", "run.yaml:13: this is not valid YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.system'"),
    "tag of a group": ("  steps: 2", "  steps: !set {2}", "run.yaml:13: the tag !set is not supported; remove it\nrun.yaml:13: a key must be a word, not '2'"),
    "half a character": ("{path: datasets/test}", '{path: "\\ud800"}', "run.yaml: a text contains half of a Unicode character, such as \\ud800; write the whole character"),
    "false tag": ("  steps: 2", "  steps: !!int x", "run.yaml: a value does not fit its tag: invalid literal for int() with base 10: 'x'"),
    "two documents": ("data:", "---\ndata:", "run.yaml:8: this is not valid YAML: but found another document"),
    "circular alias": ("  steps: 2", "  steps: &a [*a]", "run.yaml: an alias contains itself, or groups are nested too deeply"),
    "control character": ("  steps: 2", "  steps: \x01", "run.yaml:13: the character 1 is not allowed"),
}  # fmt: skip


@pytest.mark.parametrize("old, new, sentence", WRONG_FILES.values(), ids=WRONG_FILES)
def test_wrong_file(write, old, new, sentence):
    assert old in RIGHT
    found = problems(write(RIGHT.replace(old, new)))
    assert len(found) == len(sentence.splitlines())
    for problem, expected in zip(found, sentence.splitlines()):
        assert_says(problem, expected)


WHOLE_FILES = {
    "empty": (b"", "run.yaml: the file is empty; it must hold keys, such as `run:`"),
    "only a comment": (b"# nothing\n", "run.yaml: the file is empty; it must hold keys, such as `run:`"),
    "a list": (b"- run\n", "run.yaml: the file must hold keys, such as `run:`, not [run]"),
    "text": (b"hello", "run.yaml: the file must hold keys, such as `run:`, not the text 'hello'"),
    "not UTF-8": (b"run: {dir: \xff}", "run.yaml: the file is not UTF-8 text (byte 11 cannot be read); save it as UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("content, sentence", WHOLE_FILES.values(), ids=WHOLE_FILES)
def test_file_that_holds_no_keys(write, content, sentence):
    assert problems(write(content)) == [sentence]


def test_no_such_file(write):
    (problem,) = problems(Path("none.yaml"))
    assert "no config file none.yaml" in problem and str(Path("none.yaml").absolute()) in problem


def test_folder_for_a_file(write):
    Path("folder").mkdir()
    assert problems(Path("folder")) == ["folder: the file cannot be read: Is a directory"]


WRONG_WORDS = {
    "train.steps": "command line: 'train.steps' is not of the form key=value, such as optimizer.lr=3e-4",
    "=3": "command line: '=3' is not of the form key=value, such as optimizer.lr=3e-4",
    "train..steps=3": "command line: 'train..steps=3' is not of the form key=value, such as optimizer.lr=3e-4",
    "run.dir=": "command line: run.dir has no value; write run.dir=null to unset it",
    "train.lr=3": "command line: there is no key train.lr; did you mean optimizer.lr?",
    "train.steps=-1": "command line: train.steps is -1; it must be a whole number greater than 0, or null",
    "train=3": "command line: train is 3; it must be a group of keys",
    "run.dir.x=3": "command line: run.dir is a group of keys; it must be text that is not empty",
    "model.gengram.layers=[2": "command line, value of model.gengram.layers: this is not valid YAML: expected ',' or ']', but got '<stream end>'",
}


@pytest.mark.parametrize("word, sentence", WRONG_WORDS.items(), ids=WRONG_WORDS)
def test_wrong_word(write, word, sentence):
    assert problems(write(RIGHT), [word]) == [sentence]


def test_a_missing_key_is_missing_in_the_file(write):
    path = write(RIGHT.replace("  global_batch_size: 8\n", ""))
    (sentence,) = problems(path, ["train.steps=3"])
    assert sentence.startswith("run.yaml: the key train.global_batch_size is missing")


def test_all_problems_are_told_at_once(write):
    path = write(RIGHT.replace("lr: 1e-4", "lr: fast").replace("num_layers", "layers"))
    assert len(problems(path, ["oops", "run.seed=-1"])) == 5  # num_layers is missing as well


def test_values_of_words_are_those_of_files(write):
    words = [
        "optimizer.lr=1e-5", "model.gengram.layers=[2,3]", "model.gengram.window=null",
        "optimizer.distributed=false", "run.dir=2026-01-01", "train.steps=1_000", "run.dir=no",
    ]  # fmt: skip
    config = load_config(write(RIGHT), words, Config)
    assert config.optimizer.lr == 1e-5
    assert config.model.gengram.layers == [2, 3]
    assert config.model.gengram.window is None
    assert config.optimizer.distributed is False
    assert config.train.steps == 1000
    assert config.run.dir == "no"


@pytest.mark.parametrize(
    "text, value",
    [("1e-4", 1e-4), ("1.5e3", 1500.0), ("1E5", 1e5), (".5", 0.5), ("3", 3.0), ("+2.", 2.0)],
)
def test_numbers(write, text, value):
    assert load_config(write(RIGHT.replace("1e-4", text)), [], Config).optimizer.lr == value


def test_base_files_merge_and_the_later_one_wins(write):
    write(RIGHT, "base/right.yaml")
    write("model: {num_layers: 4, gengram: {layers: [1, 2], dim: 8}}", "base/small.yaml")
    write("base: [right.yaml, small.yaml]\ntrain: {steps: 5}", "base/both.yaml")
    path = write("base: ../base/both.yaml\nmodel: {gengram: {layers: [3]}}", "runs/run.yaml")
    config = load_config(path, ["train.global_batch_size=4"], Config)
    assert (config.model.hidden_size, config.model.num_layers) == (64, 4)
    assert (config.model.gengram.layers, config.model.gengram.dim) == ([3], 8)
    assert (config.train.steps, config.train.global_batch_size) == (5, 4)


def test_a_problem_is_told_where_the_value_was_set_last(write):
    write(RIGHT.replace("lr: 1e-4", "lr: slow"), "base.yaml")
    path = write("base: base.yaml\n")
    assert problems(path)[0].startswith("base.yaml:10: optimizer.lr is the text 'slow'")
    path = write("base: base.yaml\n\noptimizer:\n  lr: fast\n")
    assert problems(path)[0].startswith("run.yaml:4: optimizer.lr is the text 'fast'")
    assert problems(path, ["optimizer.lr=x"])[0].startswith("command line: optimizer.lr is")


WRONG_BASES = {
    "base: none.yaml": "run.yaml:1: base names none.yaml, but there is no file none.yaml",
    "base: run.yaml": "run.yaml:1: base goes round in a circle: run.yaml -> run.yaml",
    "base: other.yaml": "other.yaml:2: base goes round in a circle: run.yaml -> other.yaml -> run.yaml",
    "base: 3": "run.yaml:1: base is 3; it must be the name of a file or a list of such names",
    "base: []": "run.yaml:1: base is []; it must be the name of a file or a list of such names",
    "base: [3]": "run.yaml:1: base is [3]; it must be the name of a file or a list of such names",
}


@pytest.mark.parametrize("text, sentence", WRONG_BASES.items(), ids=WRONG_BASES)
def test_wrong_base(write, text, sentence):
    write("# goes back\nbase: run.yaml\n", "other.yaml")
    assert problems(write(text)) == [sentence]


def test_dump_loads_back(write):
    words = [
        "run.dir='1e-4'", "optimizer.eps=1e-12", "logging.wandb.project='a: b'", "data.path=No"
    ]  # fmt: skip
    config = load_config(write(RIGHT), words, Config)
    again = load_config(write(dump_config(config), "again.yaml"), [], Config)
    assert again == config
    assert list(again.model_dump()) == list(Config.model_fields)


Name = Annotated[str, Field(pattern="^[a-z]+$")]


class Source(Section):
    """An entry of a group with free names, as the data sets' schema has them."""

    path: Path
    species: str = Field(description="Latin name")
    parts: list[Annotated[int, Field(ge=0)]] = Field([])

    @field_validator("species")
    @classmethod
    def _two_words(cls, value: str) -> str:
        if len(value.split()) != 2:
            raise ValueError("a species has two words")
        return value


class Sources(Section):
    """A schema that is not Config."""

    sources: dict[Name, Source] = Field(min_length=1)
    more: list[Source] = Field([])
    folder: Path = Path("out")

    @model_validator(mode="after")
    def _other_folder(self) -> "Sources":
        if self.folder == Path("in"):
            raise ValueError("folder must not be in")
        return self


def test_another_schema(write):
    config = load_config(
        write("sources:\n  man: {path: a.fa, species: Homo sapiens}\n"), [], Sources
    )
    assert config.sources["man"].path == Path("a.fa")


WRONG_SOURCES = {
    "sources:\n man: {path: 3, species: a b}": "run.yaml:2: sources.man.path is 3; it must be text",
    "sources:\n man: {species: a b}": "run.yaml:2: the key sources.man.path is missing; it must be text",
    "sources:\n man: {path: x, species: a b, part: 1}": "run.yaml:2: there is no key sources.man.part; did you mean sources.man.parts?",
    "sources:\n man: {path: x, species: a b, parts: [-1]}": "run.yaml:2: sources.man.parts entry 1 is -1; it must be a whole number at least 0",
    "sources:\n man: {path: x,\n species: a}": "run.yaml:3: sources.man.species is the text 'a': a species has two words",
    "sources:\n MAN: {path: x, species: a b}": "run.yaml:2: sources has an entry 'MAN'; such names must match the pattern ^[a-z]+$",
    "sources: {}": "run.yaml:1: sources is an empty group; it must be a group of at least 1 keys",
    "sources: {man: {path: x, species: a b}}\nmore: [{path: x}]": "run.yaml:2: the key more entry 1.species is missing; it must be text (Latin name)",
    "sources: {man: {path: x, species: a b}}\nfolder: in": "run.yaml: folder must not be in",
}  # fmt: skip


@pytest.mark.parametrize("text, sentence", WRONG_SOURCES.items(), ids=WRONG_SOURCES)
def test_wrong_file_of_another_schema(write, text, sentence):
    with pytest.raises(UserError) as caught:
        load_config(write(text), [], Sources)
    assert_says(str(caught.value), sentence)


@pytest.mark.parametrize(
    "heads, words, groups",
    [
        (16, [], 8),
        (5, [], 5),
        (16, ["model.num_query_groups=4"], 4),
        (16, ["model.attention=mha"], None),
        (16, ["model.attention=mla"], None),
    ],
)
def test_attention_works_without_a_word_about_it(write, heads, words, groups):
    path = write(RIGHT)
    words = [*words, f"model.num_attention_heads={heads}", f"model.hidden_size={heads * 4}"]
    loaded = load_config(path, words, Config)
    assert loaded.model.num_query_groups == groups
    check_layout(loaded, 1)
    again = write(dump_config(loaded))
    assert load_config(again, [], Config) == loaded


KINDS = {
    "run": "run: {dir: a}\nmodel: {num_layers: 1}\n",
    "sweep": "run: {dir: a}\nmodel: {num_layers: 1}\nsweep: {grid: {run.seed: [1, 2]}}\n",
    "data": "output: a\nseq_length: 8\ngroups: {all: {sources: {one: {fasta: a.fa}}}}\n",
    "download": "output: a\nfiles: [{url: https://example.org/a.fa}]\n",
}
TAKES = {
    "run": ("gengram train", partial(load_config, schema=Config)),
    "sweep": ("gengram sweep", read_sweep),
    "data": ("gengram-data build", partial(load_config, schema=DataConfig)),
    "download": ("gengram-data download", partial(load_config, schema=DownloadConfig)),
}


@pytest.mark.parametrize("wanted", TAKES)
@pytest.mark.parametrize("given", KINDS)
def test_a_config_of_another_kind_is_sent_to_its_command(tmp_path, given, wanted):
    path = tmp_path / "given.yaml"
    path.write_text(KINDS[given])
    _, read = TAKES[wanted]
    try:
        read(path, overrides=[])
        said = ""
    except UserError as error:
        said = str(error)
    if given == wanted:
        assert "this is" not in said
    else:
        assert f"`{TAKES[given][0]} {path}`" in said and said.count("\n") == 0


@pytest.mark.parametrize("kind, stray", [("run", "groups"), ("data", "model")])
def test_a_stray_key_does_not_make_a_config_another_kind(tmp_path, kind, stray):
    path = tmp_path / "given.yaml"
    path.write_text(KINDS[kind] + f"{stray}: {{}}\n")
    with pytest.raises(UserError, match=f"there is no key {stray}"):
        TAKES[kind][1](path, overrides=[])
