"""Known shapes have the weights that their models are known to have."""

import json
from pathlib import Path

import pytest

from deepfusion.config.targets import PRESETS
from deepfusion.fleet import PUBLISHED, Model, known

WEIGHTS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "tinyllama-1.1b": 1_100_048_384,
    "olmo-1.2b": 1_176_764_416,
    "bloom-1.1b": 1_065_314_304,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "deepseek-moe-16b": 16_375_728_128,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_shapes_have_their_models_weights(name: str) -> None:
    assert Model.of(name, known(name)).shape.parameters == WEIGHTS[name]


def test_the_moes_are_those_that_recipes_know() -> None:
    assert set(PRESETS) <= set(PUBLISHED)
    assert [Model.of(name, known(name)).experts for name in PRESETS] == [60, 64]


def test_a_folder_needs_nothing_but_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["gpt2"]))
    assert Model.of("mine", known(str(tmp_path))).shape.parameters == WEIGHTS["gpt2"]


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model 'gtp2' is neither known by name \(gpt2, .*\) nor a folder"):
        known("gtp2")
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        known(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "rwkv"}')
    with pytest.raises(ValueError, match=r"model type 'rwkv' \(in .*\) is not supported: choose from gpt2, "):
        known(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["gpt2"] | {"n_head": 7}))
    with pytest.raises(ValueError, match="the config of mine describes no model"):
        Model.of("mine", known(str(tmp_path)))
