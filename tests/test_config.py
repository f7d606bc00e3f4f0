"""Recipes: read, overridden, checked, and what is said of wrong ones."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

import deepfusion.config
from deepfusion.config import Recipe, TextSource
from deepfusion.config.section import sections_in
from deepfusion.errors import InputError

PLAIN = """
name: plain
data: {source: {kind: synthetic}}
models: {base: {make: {type: llama}}, ancestors: {a: {make: {type: gpt2}}}}
"""
FILES = """
name: files
data: {source: {kind: files, sources: [{path: a.jsonl}, {path: b/c.jsonl, where: {path: d}}, {dataset: csv}]}}
models: {base: {path: base}, ancestors: {a: {path: ../a}, b: {make: {type: gpt2}}}}
device: {encoder: minilm}
"""


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two recipes in a folder, and a current directory beside it."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "plain.yaml").write_text(PLAIN)
    (tmp_path / "recipes" / "files.yaml").write_text(FILES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sources(recipe: Recipe) -> list[TextSource]:
    assert recipe.data.source.kind == "files"
    return list(recipe.data.source.sources)


# ── what is wrong ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "transfer.kinds=public",
            "transfer.kinds: must be a list of public, answered or sampled, in brackets, not 'public'",
        ),
        ("transfer.kinds=[spoken]", "transfer.kinds.0: must be public, answered or sampled, not 'spoken'"),
        ("cluster=3", "cluster: must be a section with keys of mode, k, not 3"),
        ("cluster=", "cluster: must be a section with keys of mode, k, not none"),
        ("seed=abc", "seed: must be an integer ≥ 0, not 'abc'"),
        ("seed=1.5", "seed: must be an integer ≥ 0, not 1.5"),
        ("distill.training.rows=-1", "distill.training.rows: must be an integer ≥ 1, not -1"),
        ("distill.teacher_top_k=0", "distill.teacher_top_k: must be an integer ≥ 1 or none, not 0"),
        ("device.epochs=.inf", "device.epochs: must be a number > 0, not Infinity"),
        ("device.training.warmup=1", "device.training.warmup: must be a number ≥ 0, < 1, not 1"),
        ("cluster.mode=true", "cluster.mode: must be by_domain or by_type, not true"),
        ("tune.freeze_experts=maybe", "tune.freeze_experts: must be true or false, not 'maybe'"),
        ("device.training.schedule=steep", "device.training.schedule: must be linear, cosine or constant, not 'steep'"),
        ("device.encoder=3", "device.encoder: must be text, not 3"),
        ("models.ancestors={}", "models.ancestors: must have at least 1 entry, not 0"),
        ("models.ancestors=3", "models.ancestors: must be a mapping of names to sections, not 3"),
        ("models.base={}", "models.base: give exactly one of `path` and `make`"),
        ("data=", "data: must be a section with keys of source, partition, not none"),
        ("data={}", "data.source: is missing, and must be a section of kind synthetic or files"),
        ("data.source={}", "data.source.kind: is missing, and must be synthetic or files"),
        ("data.source.kind=web", "data.source.kind: must be synthetic or files, not 'web'"),
        ("distill.objective=3", "distill.objective: must be a section of kind logits, vaa or ofa, not 3"),
        (
            "data.source={kind: files, sources: [{path: a, where: 3}]}",
            "data.source.sources.0.where: must be a mapping to text or a list of text, in brackets, not 3",
        ),
        ("data.source={kind: files}", "data.source.sources: is missing, and must be a list of sections, in brackets"),
        ("name=a/b", "name: must be letters, digits, '_', '.' and '-', and begin with a letter or digit, not 'a/b'"),
        ("clutser.k=2", "unknown key 'clutser': did you mean 'cluster'?"),
        ("distill.objective.bta=1", "unknown key 'distill.objective.bta': did you mean 'beta'?"),
        ("cluster.size=2", "unknown key 'cluster.size': there are mode, k"),
        (
            "models.base.make.type=gpt2",
            "models.base and assemble do not fit: no MoE is assembled from gpt2 models: choose a base of type llama, "
            "mistral, qwen2, qwen3, olmo2",
        ),
        (
            "assemble.target=qwen3_moe",
            "models.base and assemble do not fit: a qwen3_moe is assembled from qwen3 models, not llama: choose "
            "another base model, or assemble.target: auto",
        ),
        (
            "assemble={layout: fine_grained, granularity: 4, expert_width: 40}",
            "models.base and assemble do not fit: expert_width is 40, but an FFN of 192 cut into 4 needs 48",
        ),
        (
            "assemble.layout=fine_grained",
            "assemble: layout: fine_grained and granularity go together: give both or none",
        ),
        ("assemble.preset=deepseek-moe-16b", "assemble.preset deepseek-moe-16b needs cluster.k: 8, not 4"),
        (
            "assemble={preset: qwen1.5-moe-a2.7b, top_k: 2}",
            "assemble: preset qwen1.5-moe-a2.7b has top_k: 1, not 2: leave either out",
        ),
        (
            "assemble={target: mixtral, renormalise: false}",
            "assemble: a mixtral always renormalises: leave renormalise out, or choose another target",
        ),
        (
            "assemble={target: deepseek, layout: fine_grained, granularity: 8}",
            "assemble: a fine-grained deepseek uses one student's FFN for a token: set top_k: 1",
        ),
        ("assemble={target: deepseek, shared_width: 512}", "assemble: a deepseek has no shared_width: leave it out"),
        (
            "device.upload=adapter",
            "device: upload: adapter needs method: lora or qlora, for full training has no adapter to send",
        ),
        (
            "device.codec={numbers: nf4, rank: 8}",
            "device.codec: rank is that of a change: set delta: true, or leave rank out",
        ),
        (
            "device={method: lora, upload: adapter, codec: {delta: true}}",
            "device: codec.delta is what changed in the ancestor, which an adapter is already: leave it out",
        ),
        (
            "device={upload: adapter, own: {tablet: {lora: {rank: 2}}}}",
            "device: upload: adapter needs method: lora or qlora, for full training has no adapter to send",
        ),
        (
            "device.own={tablet: {upload: adapter}}",
            "device: own.tablet: upload: adapter needs method: lora or qlora, for full training has no adapter to send",
        ),
        (
            "device.own={tablet: {epochs: 3}}",
            "unknown key 'device.own.tablet.epochs': there are method, lora, upload, codec",
        ),
        ("device.codec.numbers=int4", "device.codec.numbers: must be float32, bfloat16, int8 or nf4, not 'int4'"),
        ("device.method=LoRA", "device.method: must be full, lora or qlora, not 'LoRA'"),
        ("device.lora.targets=[]", "device.lora.targets: must have at least 1 entry, not 0"),
        ("seed=" + "x" * 100, "seed: must be an integer ≥ 0, not '" + "x" * 59 + "…"),
    ],
)
def test_a_fault_is_told_with_what_was_given_and_what_is_allowed(setting: str, message: str, there: Path) -> None:
    with pytest.raises(InputError) as raised:
        Recipe.load("recipes/plain.yaml", [setting])
    assert str(raised.value) == f"recipes/plain.yaml: {message}"


def test_shifted_teachers_are_heard_by_chunks_in_tuning_too(there: Path) -> None:
    assert Recipe.load("recipes/plain.yaml", ["distill.shifted=true"]).tune.objective.across == "auto"
    with pytest.raises(InputError, match=r"distill\.shifted needs tune\.objective\.across: auto or span_likelihood"):
        Recipe.load("recipes/plain.yaml", ["distill.shifted=true", "tune.objective.across=mined"])


@contextmanager
def suppress_input_errors(said: list[str]) -> Generator[None]:
    """Note what is said of a recipe, if anything."""
    try:
        yield
    except InputError as error:
        said.append(str(error))


def test_no_fault_is_told_in_the_words_of_a_library() -> None:
    """Whatever stands in place of a key's value."""
    tree = yaml.safe_load(PLAIN)
    wrong: list[Any] = [None, -1.5, "x y", [[]], {"q": 1}]
    said: list[str] = []
    for name, field in Recipe.model_fields.items():
        for key in ("", *(key for section in sections_in(field.annotation) for key in section.model_fields)):
            for value in wrong:
                changed = value if not key else {**(tree.get(name) or {}), key: value}
                with suppress_input_errors(said):
                    Recipe.parse(tree | {name: changed})
    assert len(said) > 100
    words = ("Input", "valid", "dictionary", "tuple", "instance", "discriminator", "\n")
    assert [text for text in said if any(word in text for word in words)] == []


def test_a_preset_fills_in_its_shape() -> None:
    tree = yaml.safe_load(PLAIN) | {"cluster": {"k": 8}}
    tree["models"]["base"]["make"]["ffn"] = 10944
    recipe = Recipe.parse(tree | {"assemble": {"preset": "deepseek-moe-16b", "router": "random"}})
    asked = recipe.assemble
    assert (asked.target, asked.layout, asked.granularity, asked.top_k) == ("deepseek", "fine_grained", 8, 1)
    assert (asked.expert_width, asked.renormalise, asked.router_scale) == (1408, False, 0.1)
    assert Recipe.parse(recipe.model_dump()) == recipe
    louder = {"preset": "deepseek-moe-16b", "router_scale": 0.5}
    assert Recipe.parse(tree | {"assemble": louder}).assemble.router_scale == 0.5


def test_several_faults_are_one_line(there: Path) -> None:
    with pytest.raises(InputError) as raised:
        Recipe.load("recipes/plain.yaml", ["seed=x", "cluster.kk=1"])
    assert str(raised.value) == (
        "recipes/plain.yaml: seed: must be an integer ≥ 0, not 'x'; unknown key 'cluster.kk': did you mean 'k'?"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "line 1, column 5 is not YAML: while parsing a flow node expected the node content, but found "),
        ("a: 1\n\tb: 2\n", "line 2, column 1 is not YAML: while scanning "),
        ("a: 1\nb: \x01\n", "line 2, column 4 is not YAML: special characters are not allowed (character 1)"),
    ],
)
def test_what_is_no_yaml_is_told_with_its_place(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(InputError) as raised:
        Recipe.load(tmp_path / "r.yaml")
    assert str(raised.value).startswith(f"{tmp_path / 'r.yaml'}, {message}")
    assert "unicode string" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: a\nseed: 1\nseed: 2\n", "line 3, column 1 is not YAML: key 'seed' stands in line 2 already: "),
        ("cluster: {k: 2, mode: by_type, k: 4}\n", "line 1, column 32 is not YAML: key 'k' stands in line 1 already: "),
        ("a: {x: 1}\nb:\n  x: 1\n  'x': 2\n", "line 4, column 3 is not YAML: key 'x' stands in line 3 already: "),
    ],
)
def test_a_key_that_stands_twice_is_named(content: str, message: str, tmp_path: Path) -> None:
    """Of which the last would otherwise count, and the first be read by people."""
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(InputError) as raised:
        Recipe.load(tmp_path / "r.yaml")
    assert str(raised.value) == f"{tmp_path / 'r.yaml'}, {message}keep one of the two"


def test_what_a_merge_brings_may_be_said_anew(there: Path) -> None:
    repeated = "device: {training: &all {rows: 3, clip: 2}}\ndistill: {training: {<<: *all, rows: 5}}\n"
    (there / "recipes" / "plain.yaml").write_text(PLAIN + repeated)
    recipe = Recipe.load("recipes/plain.yaml")
    assert (recipe.distill.training.rows, recipe.distill.training.clip) == (5, 2)


def test_a_setting_with_a_key_twice_is_named(there: Path) -> None:
    with pytest.raises(
        InputError, match=r"--set cluster: '{k: 1, k: 2}' is not a YAML value: key 'k' stands in line 1"
    ):
        Recipe.load("recipes/plain.yaml", ["cluster={k: 1, k: 2}"])


def test_a_recipe_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(InputError, match=r"r\.yaml is not UTF-8 \(byte 9\): save the file as UTF-8"):
        Recipe.load(tmp_path / "r.yaml")


@pytest.mark.parametrize("content", ["", "- a\n", "word\n"])
def test_a_recipe_is_a_mapping(content: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(InputError, match=r"r\.yaml: a recipe must be a mapping of sections"):
        Recipe.load(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("{type: gpt2, hidden: 33}", "hidden 33 and 4 heads do not fit: "),
        (
            "{type: llama, hidden: 60, heads: 4}",
            "so make hidden a multiple of 8, or change heads",
        ),
        ("{type: bloom, hidden: 64}", "a made bloom has an ffn of 4 × hidden: set ffn to 256, not 192"),
    ],
)
def test_a_shape_that_cannot_be_is_found_before_it_is_made(shape: str, message: str, there: Path) -> None:
    with pytest.raises(InputError) as raised:
        Recipe.load("recipes/plain.yaml", [f"models.ancestors.b.make={shape}"])
    assert str(raised.value).startswith("recipes/plain.yaml: models.ancestors.b.make: ")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("{kind: vaa, width: 10}", "distill.objective: width 10 is not a multiple of heads 4"),
        ("{kind: vaa, attention: true, matching: relational}", "objective: matching relational has nothing to train: "),
        ("{kind: vaa, attention: false, matching: relational, warmup: 1}", "set attention: false and leave warmup out"),
        ("{kind: vaa, attention: false, causal: true}", "objective: causal is about attention: set attention: true"),
        ("{kind: vaa, attention: false, residual: true}", "objective: residual is about attention: "),
        ("{kind: vaa, stages: 4}", "distill.objective.stages is 4 but models.base has only 3 layers"),
    ],
)
def test_an_objective_that_fits_no_model_is_found_before_distilling(setting: str, message: str, there: Path) -> None:
    with pytest.raises(InputError, match=message):
        Recipe.load("recipes/plain.yaml", [f"distill.objective={setting}"])


# ── --set ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_who_sets_one_key_keeps_the_default_of_the_others(there: Path) -> None:
    """Also where a section's default is not its class's: tuning is gentler than other trainings."""
    tune = Recipe.load("smoke", ["tune={training: {rows: 3}}"]).tune
    assert (tune.training.rows, tune.training.learning_rate) == (3, 3e-4)
    assert Recipe.load("smoke", ["distill={training: {rows: 3}}"]).distill.training.learning_rate == 3e-3


@pytest.mark.parametrize("setting", ["distill.task_vectors=true", "device.epochs=false", "device.training.rows=true"])
def test_a_switch_is_no_number(setting: str, there: Path) -> None:
    with pytest.raises(InputError, match=r"must be a number, not (true|false)"):
        Recipe.load("smoke", [setting])


def test_settings_reach_sections_mappings_and_lists(there: Path) -> None:
    settings = ["cluster.k=2", "models.ancestors.c.path=/c", "data.source.sources.1.max_rows=5"]
    recipe = Recipe.load("recipes/files.yaml", settings)
    assert recipe.cluster.k == 2
    assert recipe.models.ancestors["c"].path == "/c"
    assert [source.max_rows for source in sources(recipe)] == [None, 5, None]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed", "--set takes key=value, not 'seed'"),
        ("=3", "--set takes key=value, not '=3'"),
        ("cluster..k=3", "--set takes key=value, not 'cluster..k=3'"),
        ("seed.low=3", "--set seed.low: seed is 7, which has no keys"),
        ("seed=[", "--set seed: '[' is not a YAML value: "),
        (
            "data.source.sources.3.path=x",
            "--set data.source.sources.3: the list has 3 entries, counted from 0, and none is '3'",
        ),
        ("data.source.sources.x=1", "--set data.source.sources.x: the list has 3 entries, counted from 0, "),
    ],
)
def test_a_setting_that_leads_nowhere_is_named(setting: str, message: str, there: Path) -> None:
    (there / "recipes" / "files.yaml").write_text(FILES + "seed: 7\n")
    with pytest.raises(InputError) as raised:
        Recipe.load("recipes/files.yaml", [setting])
    assert str(raised.value).startswith(message)


def test_a_setting_changes_one_place_of_what_yaml_repeats(there: Path) -> None:
    repeated = "device: {training: &all {rows: 3}}\ndistill: {training: *all}\n"
    (there / "recipes" / "plain.yaml").write_text(PLAIN + repeated)
    recipe = Recipe.load("recipes/plain.yaml", ["device.training.rows=5"])
    assert (recipe.device.training.rows, recipe.distill.training.rows) == (5, 3)


# ── paths ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_paths_count_from_the_recipe_and_those_of_settings_from_here(there: Path) -> None:
    settings = ["data.source.sources.0.path=here.jsonl", "models.base={path: ../here}", "device.encoder=encoder"]
    plain, changed = Recipe.load("recipes/files.yaml"), Recipe.load("recipes/files.yaml", settings)
    folder = there / "recipes"
    assert [source.path for source in sources(plain)] == [str(folder / "a.jsonl"), str(folder / "b" / "c.jsonl"), None]
    assert (plain.models.base.path, plain.models.ancestors["a"].path) == (str(folder / "base"), str(there / "a"))
    assert plain.device.encoder == str(folder / "minilm")
    assert sources(plain)[1].where == {"path": "d"}  # a column's name
    assert [source.path for source in sources(changed)][:2] == [
        str(there / "here.jsonl"),
        str(folder / "b" / "c.jsonl"),
    ]
    assert changed.models.base.path == str(there.parent / "here")
    assert changed.device.encoder == str(there / "encoder")


def test_an_embedded_recipe_finds_the_same_files_by_name_and_by_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkout").mkdir()
    monkeypatch.chdir(tmp_path / "checkout")
    Path("recipes").symlink_to(Path(deepfusion.config.__file__).parents[1] / "recipes")
    named, by_path = Recipe.load("medical_finance"), Recipe.load("recipes/medical_finance.yaml")
    assert named == by_path
    assert sources(named)[0].path == str(tmp_path / "shared" / "data" / "medical_open.jsonl")


def test_a_file_of_that_name_goes_before_an_embedded_recipe(there: Path) -> None:
    (there / "demo").write_text(PLAIN)
    assert Recipe.load("demo").name == "plain"


def test_every_public_name_is_where_it_always_was() -> None:
    assert all(hasattr(deepfusion.config, name) for name in deepfusion.config.__all__)
