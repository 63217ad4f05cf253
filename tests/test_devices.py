"""Devices under names: what is kept, what is refused, and what ssh is told."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import Ended
from hypothesis import given
from hypothesis import strategies as st

from export.devices.doctor import needs
from export.devices.presets import PRESETS
from export.devices.registry import (
    Device,
    add_device,
    check_device,
    config_file,
    find_device,
    read_devices,
    remove_device,
)
from export.devices.ssh import SSH_CONFIG, by_hand, carry, ssh_command
from toolchain.errors import UsageError
from toolchain.recipe.load import load_recipe, recipe_path

ORIN = Device("orin", "me@orin.local", 2222, "venv/bin/python", "jetson-orin-nano", "/data/clipkd")


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config"


def test_what_is_added_is_found_until_it_is_removed(config: Path) -> None:
    assert read_devices() == {}
    add_device(ORIN)
    add_device(Device("pi", "pi"))
    assert config_file() == config / "clipkd" / "devices.json"
    assert find_device("orin") == ORIN
    with pytest.raises(
        UsageError, match=r"a device with this name exists \(me@orin\.local\); replace it with --replace"
    ):
        add_device(replace(ORIN, port=22))
    add_device(replace(ORIN, port=22), replace=True)
    assert find_device("orin").port == 22
    remove_device("orin")
    assert set(read_devices()) == {"pi"}
    with pytest.raises(UsageError, match="no device 'orin'; known devices: pi"):
        remove_device("orin")


@pytest.mark.parametrize(
    "changes",
    [
        *(
            {"destination": text}
            for text in ("-oProxyCommand=touch x", "a b", "a;b", "$(x)", "me@-x", "", "a\nb", "@h")
        ),
        *({"destination": text} for text in ("me@h@i", "h'", "ssh://h", "-", "me me@h", "h\u202e", "a`b`")),
        *({"name": text} for text in ("cpu", "cuda:0", "gpu", "../x", "-x", "", ".x", "A", "a/b", "a b")),
        *({"port": number} for number in (0, 65536, -1)),
        *({"python": text} for text in ("", "-c", "a\nb", "\0")),
        *({"workdir": text} for text in ("", "-x", "a\nb")),
        {"preset": "toaster"},
    ],
)
def test_fields_that_could_be_taken_for_something_else_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        add_device(replace(ORIN, **changes))  # type: ignore[arg-type]
    assert not config_file().exists()


@pytest.mark.parametrize("destination", ["host", "me@host.example", "10.0.0.7", "fe80::1%eth0", "me@::1", "a_b-c"])
def test_destinations_that_ssh_takes_are_taken(destination: str) -> None:
    assert check_device(Device("x", destination)).destination == destination


@given(st.text())
def test_no_destination_is_an_option_or_more_than_one_word(destination: str) -> None:
    try:
        check_device(Device("x", destination))
    except UsageError:
        return
    assert not destination.startswith("-")
    assert not set(destination) & set(" \t\r\n'\"\\$`;&|<>(){}[]*?!#~\0")


def test_ssh_never_asks_and_never_waives_a_host_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SSH_CONFIG, raising=False)
    words = ssh_command(ORIN, "true")
    assert words[-3:] == ["--", "me@orin.local", "true"]
    assert "BatchMode=yes" in words
    assert "StrictHostKeyChecking" not in " ".join(words)
    assert words[words.index("-p") + 1] == "2222"
    assert "-F" not in words
    monkeypatch.setenv(SSH_CONFIG, "/a b/config")
    assert ssh_command(ORIN, "true")[1:3] == ["-F", "/a b/config"]


def test_what_a_user_types_survives_two_shells() -> None:
    assert by_hand(Device("x", "h"), "echo", "a b") == "ssh -- h 'echo '\"'\"'a b'\"'\"''"


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", '{"devices": []}', '{"devices": {"x": {}}}', '{"devices": {"x": {"destination": 5}}}'),
        *('{"devices": {"x": {"destination": "-oX"}}}', '{"devices": {"x": {"destination": "h", "password": "p"}}}'),
    ],
)
def test_a_file_that_is_not_clipkds_is_said(content: str) -> None:
    config_file().parent.mkdir(parents=True)
    config_file().write_text(content)
    with pytest.raises(UsageError, match="fix or delete the file"):
        read_devices()
    assert config_file().read_text() == content


def test_arguments_that_are_paths_are_carried(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("images/0.jpg", "images/1.jpg", "image.engine", "engine.json"):
        (tmp_path / name).write_text(name)
    files, words = carry(["--model", tmp_path / "image.engine", "--images", tmp_path / "images", "--threads", "2"])
    assert words == ["--model", "1/image.engine", "--images", "3/images", "--threads", "2"]
    assert {name: path.name for name, path in files.items()} == {
        "1/image.engine": "image.engine",
        "1/engine.json": "engine.json",
        "3/images/0.jpg": "0.jpg",
        "3/images/1.jpg": "1.jpg",
    }


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_of_what_exists(name: str) -> None:
    preset = PRESETS[name]
    here, there = needs(None, replace(ORIN, preset=name))  # every runtime it names is one that doctor probes
    assert here == frozenset()
    assert {"measure", "pictures"} < there
    assert set(preset.precisions) <= {"fp32", "fp16", "bf16", "int8", "int8-fp16"}
    assert preset.source
    assert (preset.tensorrt is not None) <= name.startswith("jetson")


def test_what_a_recipe_and_a_device_need() -> None:
    recipe = load_recipe(recipe_path("glyphs"))
    here, there = needs(recipe, None)
    assert {"train", "quantize", "export", "report", "onnxruntime cpu"} <= here
    assert there == frozenset()
    assert "quantize" not in needs(load_recipe(recipe_path("glyphs"), ["export.precisions=[fp32]"]), None)[0]
    assert "onnxruntime cpu" in needs(recipe, Device("x", "h"))[1]  # of the recipe's runtimes
    assert needs(None, "cuda:1")[0] == {"measure", "pictures", "nvidia driver", "onnxruntime cuda"}
    assert needs(None, None) == (frozenset(), frozenset())
    assert "tensorrt build" in needs(None, ORIN)[1]


def test_the_command_line(clipkd: Callable[..., Ended], config: Path) -> None:
    added = clipkd("devices", "add", "orin", "me@orin", "--preset", "jetson-orin-nano", "--json")
    assert added.code == 0, added.err
    assert json.loads(added.out) == asdict(Device("orin", "me@orin", preset="jetson-orin-nano"))
    assert "clipkd devices test orin" in added.err
    assert clipkd("devices", "add", "orin", "me@orin").code == 2
    assert clipkd("devices", "add", "x", "--", "-oProxyCommand=x").code == 2
    presets = json.loads(clipkd("devices", "list", "--presets", "--json").out)
    assert set(presets) == set(PRESETS)
    listed = json.loads(clipkd("devices", "list", "--json").out)
    assert listed["local"][0]["name"] == "cpu"
    assert [device["name"] for device in listed["remote"]] == ["orin"]
    assert clipkd("devices", "remove", "orin").code == 0
    assert clipkd("devices", "test", "orin").code == 2
    assert clipkd("profile", "nowhere", "--device", "orin").code == 2
