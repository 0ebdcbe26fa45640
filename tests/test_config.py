import re
from pathlib import Path

import pytest

from app.config import Settings, load_settings
from app.errors import ConfigurationError

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_defaults_serve_the_models_of_the_checkout_on_loopback() -> None:
    settings = load_settings({})
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.model_repository == "models"
    assert settings.replay_clock is None


def test_a_mistyped_name_is_refused_and_named() -> None:
    with pytest.raises(ConfigurationError, match="HIKYAKU_PROT"):
        load_settings({"HIKYAKU_PROT": "9000"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HIKYAKU_PORT", "eight"),
        ("HIKYAKU_PORT", "70000"),
        ("HIKYAKU_MAX_BODY_BYTES", "0"),
        ("HIKYAKU_REPLAY_CLOCK", "2013-12-31T18:00:00"),
        ("HIKYAKU_LOG_LEVEL", "LOUD"),
    ],
)
def test_a_wrong_value_is_refused_and_its_variable_named(name: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        load_settings({name: value})


def test_an_empty_variable_is_as_good_as_none() -> None:
    assert load_settings({"FEATURE_REDIS_URL": ""}).feature_redis_url is None


def test_the_readme_lists_every_setting_and_no_other() -> None:
    section = README.partition("## Settings")[2].partition("\n## ")[0]
    listed = dict(re.findall(r"^\| `([A-Z_]+)` \| (.+?) \|", section, re.MULTILINE))
    known = {
        str(field.alias): "—" if field.default is None else f"`{field.default}`"
        for field in Settings.model_fields.values()
    }
    assert listed == known


def test_empty_trusted_keys_do_not_stand_for_none() -> None:
    with pytest.raises(ConfigurationError, match="HIKYAKU_TRUSTED_KEYS: is empty"):
        load_settings({"HIKYAKU_TRUSTED_KEYS": ""})
