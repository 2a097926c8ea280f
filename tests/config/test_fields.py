import dataclasses

import pytest

from m2t_accel.config.fields import (
    ConfigurationError,
    check_limits,
    convert_all,
    did_you_mean,
    fields_by_heading,
    is_hub_id,
    one_line,
    setting,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    name: str = setting("plain", "a word", choices=("plain", "fancy"))
    number: int | None = setting(None, "a whole number or none", at_least=1, at_most=9)
    rate: float = setting(0.5, "a number", above=0, below=1)
    pair: tuple[float, float] = setting((0.1, 0.2), "two numbers", above=0)
    switch: bool = setting(False, "yes or no")


def built(**given):
    settings = Settings(**convert_all(Settings, given))
    for field in dataclasses.fields(settings):
        check_limits(field.name, getattr(settings, field.name), field.metadata)
    return settings


def test_a_flag_and_yaml_read_alike():
    from_flags = built(name="fancy", number="3", rate="1e-2", pair=["1", "2.5"], switch="true")
    from_yaml = built(name="fancy", number=3, rate=0.01, pair=[1, 2.5], switch=True)
    assert from_flags == from_yaml == Settings(name="fancy", number=3, rate=0.01, pair=(1.0, 2.5), switch=True)
    assert built(number="none") == built(number=None) == Settings()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nmae": "x"}, "unknown setting nmae, did you mean name?; --help lists them all"),
        ({"name": "fancier"}, "--name fancier: unknown, did you mean fancy?; one of plain, fancy"),
        ({"name": ""}, "--name is empty: leave it out, or give it a value"),
        ({"number": 1.5}, "--number 1.5: a whole number is needed"),
        ({"number": True}, "--number True: a whole number is needed"),
        ({"number": 10}, "--number 10 is out of range: at most 9 is allowed"),
        ({"number": 0}, "--number 0 is out of range: at least 1 is allowed"),
        ({"rate": 1}, "--rate 1 is out of range: less than 1 is allowed"),
        ({"rate": "nan"}, "--rate nan: not a finite number"),
        ({"pair": [1]}, "--pair 1: 2 numbers are needed"),
        ({"pair": [1, 0]}, "--pair 0 is out of range: more than 0 is allowed"),
        ({"switch": "yes"}, "--switch yes: true or false is needed"),
        ({"switch": {}}, "--switch {}: true or false is needed"),
    ],
)
def test_what_is_not_allowed(given, message):
    with pytest.raises(ConfigurationError) as caught:
        built(**given)
    assert str(caught.value) == message


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoreSettings(Settings):
    speed: float = setting(1.0, "a number", heading="training")
    name: str = setting("plain", "a word", choices=("plain", "fancy"), heading="the run")
    seed: int = setting(0, "a whole number")


def test_settings_come_in_groups_a_classs_own_first():
    groups = fields_by_heading(MoreSettings)
    names = {heading: [item.name for item in items] for heading, items in groups.items()}
    assert names == {"the run": ["name", "seed"], "training": ["speed"], "": ["number", "rate", "pair", "switch"]}
    assert next(iter(names)) == "the run"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManyNumbers:
    rates: tuple[float, ...] = setting((0.1,), "numbers", above=0)
    size: tuple[float, float] | None = setting(None, "two numbers, or none")


@pytest.mark.parametrize("given", ["0.1,2", ["0.1,2"], ["0.1", 2], [0.1, "2"]])
def test_as_many_numbers_as_one_likes(given):
    assert convert_all(ManyNumbers, {"rates": given}) == {"rates": (0.1, 2.0)}
    assert convert_all(ManyNumbers, {"size": ["1", 2]}) == {"size": (1.0, 2.0)}
    assert convert_all(ManyNumbers, {"size": "none", "rates": 3}) == {"size": None, "rates": (3.0,)}
    with pytest.raises(ConfigurationError, match="--rates fast: a number is needed"):
        convert_all(ManyNumbers, {"rates": "1,fast"})


def test_words_of_an_error():
    assert did_you_mean("ResNet5", ["resnet50", "vgg"]) == ", did you mean resnet50?"
    assert did_you_mean("xyz", ["resnet50", "vgg"]) == ""
    assert one_line(ValueError("one\n two.")) == "ValueError: one two"
    assert len(one_line(ValueError("word " * 999))) <= 240


def test_the_form_of_a_hub_id():
    assert is_hub_id("ILSVRC/imagenet-1k")
    assert not any(is_hub_id(text) for text in ("imagenet", "../data", "a/b/c", "user/", "/name"))
