"""Which sampling runs: asked for, else the checkpoint's, else greedy; and what is told of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_command import Loader
from test_generation import echo, scripted_model
from tiny import Compiled, moac_command

import moac_runtime
from moac_runtime.engine import model as generation
from moac_runtime.engine.chosen import choose_sampling
from moac_runtime.engine.sampling import Sampler
from moac_runtime.errors import ArtifactError, UsageError
from moac_runtime.package.manifest import manifest_digest

SAMPLED = {"do_sample": True, "temperature": 0.6, "top_k": 20}
BIG = 10**400


@pytest.mark.parametrize(
    ("asked", "defaults", "told"),
    [
        ({}, None, "greedy (default)"),
        ({}, {}, "greedy (default)"),
        ({"temperature": None, "top_k": None}, {}, "greedy (default)"),
        ({}, SAMPLED, "temperature 0.6 (checkpoint), top_k 20 (checkpoint)"),
        ({}, {"do_sample": True}, "temperature 1 (checkpoint)"),
        ({}, {"do_sample": True, "temperature": None}, "temperature 1 (checkpoint)"),
        ({}, {"do_sample": True, "temperature": 0.0}, "greedy (checkpoint)"),
        ({}, {"do_sample": False, "temperature": 0.6}, "greedy (checkpoint)"),
        ({}, {"do_sample": None, "temperature": 0.6, "top_k": 20}, "greedy (default)"),
        ({}, {"temperature": 0.6, "top_k": 50, "top_p": 0.9}, "greedy (default)"),
        (
            {},
            {"repetition_penalty": 1.1},
            "greedy (default), repetition_penalty 1.1 (checkpoint)",
        ),
        (
            {"temperature": 0},
            {**SAMPLED, "repetition_penalty": 1.1},
            "greedy (explicit), repetition_penalty 1.1 (checkpoint)",
        ),
        ({"temperature": 0}, SAMPLED, "greedy (explicit)"),
        (
            {"top_k": 5, "seed": 1},
            SAMPLED,
            "temperature 0.6 (checkpoint), top_k 5 (explicit), seed 1 (explicit)",
        ),
        (
            {"temperature": 0.8},
            {"temperature": 0.6, "top_p": 0.9},
            "temperature 0.8 (explicit), top_p 0.9 (checkpoint)",
        ),
        ({"temperature": 0.8, "top_p": 1.0}, SAMPLED | {"top_p": 0.9}, None),
        ({}, {"max_new_tokens": 4, "max_length": 8, "custom": "x"}, "greedy (default)"),
    ],
)
def test_the_rule(asked: Any, defaults: Any, told: str | None) -> None:
    chosen = choose_sampling(asked, defaults)
    if told is None:
        told = "temperature 0.8 (explicit), top_k 20 (checkpoint), top_p 1 (explicit)"
    assert chosen.told() == told
    assert chosen.options.max_tokens == 256
    assert (chosen.idle, chosen.unserved) == ((), ())


def test_the_librarys_own_top_k_is_not_the_checkpoints() -> None:
    assert choose_sampling({}, {"do_sample": True}).options.top_k == 0
    assert choose_sampling({}, {"do_sample": True, "top_k": 50}).options.top_k == 50


@pytest.mark.parametrize("defaults", [None, {"do_sample": False}, {"temperature": 0.7}])
def test_what_is_asked_for_and_has_no_effect(defaults: Any) -> None:
    assert choose_sampling({"top_p": 0.9, "seed": 1}, defaults).idle == ("top_p", "seed")
    assert choose_sampling({"top_p": 0.9, "seed": 1}, SAMPLED).idle == ()


def test_what_the_checkpoint_recommends_and_nobody_does() -> None:
    stated = {"num_beams": 4, "typical_p": 0.9, "stop_strings": ["END"], "no_repeat_ngram_size": 3}
    found = choose_sampling({}, stated).unserved
    assert found == ("num_beams", "typical_p", "no_repeat_ngram_size", "stop_strings")
    idle = {"num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0, "suppress_tokens": None}
    assert choose_sampling({}, idle | {"stop_strings": []}).unserved == ()


@pytest.mark.parametrize(
    ("name", "found", "expected"),
    [
        ("temperature", "hot", "a number"),
        ("temperature", True, "a number"),
        ("temperature", -1, ">= 0"),
        ("temperature", float("inf"), ">= 0"),
        ("temperature", BIG, "a number"),
        ("top_k", 2.5, "a whole number"),
        ("top_k", -1, ">= 0"),
        ("top_p", 0, "above 0 and at most 1"),
        ("top_p", [0.9], "a number"),
        ("min_p", 2, "between 0 and 1"),
        ("repetition_penalty", 0.0, "above 0"),
        ("do_sample", "yes", "true or false"),
    ],
)
def test_a_wrong_value_of_the_checkpoint_is_told_where_it_would_be_used(
    name: str, found: Any, expected: str
) -> None:
    stated = {**SAMPLED, name: found}
    with pytest.raises(ArtifactError, match=f"{name} = .*, expected {expected}; give --"):
        choose_sampling({}, stated)
    values = {"temperature": 0} if name == "do_sample" else {name: 1}
    assert choose_sampling(values, stated).origins["temperature"] in ("explicit", "checkpoint")


def test_a_wrong_value_that_was_asked_for() -> None:
    with pytest.raises(UsageError, match="top_p must be above 0"):
        choose_sampling({"top_p": 2.0}, SAMPLED)


def test_a_model_follows_its_checkpoint_unless_told_otherwise() -> None:
    model, _ = scripted_model("abcdefgh")
    model.defaults = {"do_sample": True, "temperature": 1000.0}
    greedy = model.generate("go", temperature=0)[0].text
    assert greedy == "abcdefgh"
    asked: Any = {"seed": 3, "max_tokens": 8}
    assert model.generate("go", **asked)[0].text != greedy
    drawn = model.generate("go", temperature=None, **asked)[0].token_ids
    assert drawn == model.generate("go", **asked)[0].token_ids
    stream = model.stream("go", **asked)
    list(stream)
    assert stream.generation.token_ids == drawn


def recommending(package: Path, target: Path, defaults: Any) -> Path:
    """A copy of `package` whose checkpoint recommended `defaults`."""
    from dataclasses import asdict

    from moac_runtime.package.integrity import hash_files

    shutil.copytree(package, target)
    name = "tokenizer/generation.json"
    settings = json.loads((target / name).read_text())
    (target / name).write_text(json.dumps(settings | {"defaults": defaults}))
    manifest = json.loads((target / "moac.json").read_text())
    manifest["files"][name] = asdict(hash_files(target, [name])[name])
    manifest["digest"] = manifest_digest(manifest)
    (target / "moac.json").write_text(json.dumps(manifest))
    return target


def test_run_says_which_sampling_ran_and_whence(
    tiny_package: Compiled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = recommending(tiny_package.package, tmp_path / "out", SAMPLED | {"num_beams": 4})
    asked = ["run", package, "--prompt", "hi", "--max-tokens", "2"]
    assert moac_command(*asked) == 0
    err = capsys.readouterr().err
    assert "sampling temperature 0.6 (checkpoint), top_k 20 (checkpoint)\n" in err
    assert err.count("note: the checkpoint also recommends num_beams, which") == 1

    assert moac_command(*asked, "--top-k", "5", "--json") == 0
    sampling = json.loads(capsys.readouterr().out)["sampling"]
    assert sampling["greedy"] is False
    assert sampling["temperature"] == {"value": 0.6, "from": "checkpoint"}
    assert sampling["top_k"] == {"value": 5, "from": "explicit"}
    assert sampling["seed"] == {"value": None, "from": "default"}
    assert sampling["unserved"] == ["num_beams"]

    assert moac_command(*asked, "--temperature", "0", "--json") == 0
    sampling = json.loads(capsys.readouterr().out)["sampling"]
    assert (sampling["greedy"], sampling["temperature"]["from"]) == (True, "explicit")
    assert "top_k" not in sampling


@pytest.mark.parametrize(
    ("defaults", "words"),
    [([1], "has defaults [1], expected a JSON object"), (SAMPLED | {"top_k": "x"}, "top_k = 'x'")],
)
def test_a_package_with_wrong_recommendations(
    defaults: Any,
    words: str,
    tiny_package: Compiled,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    package = recommending(tiny_package.package, tmp_path / "out", defaults)
    capsys.readouterr()
    assert moac_command("run", package, "--prompt", "hi") == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err


def test_a_sampling_flag_beside_greedy_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generation, "load", Loader(*scripted_model(echo)))
    asked = ["run", "out", "--prompt", "hi", "--raw", "--max-tokens", "9"]
    assert moac_command(*asked, "--top-p", "0.9", "--seed", "1") == 0
    assert "note: --top-p and --seed have no effect" in capsys.readouterr().err
    assert moac_command(*asked, "--top-p", "0.9", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["sampling"]["idle"] == ["top_p"]
    assert "note: --top-p has no effect" in err
    assert moac_command(*asked, "--top-p", "0.9", "--temperature", "1") == 0
    assert "note:" not in capsys.readouterr().err


def test_verify_and_eval_never_sample(
    tiny_package: Compiled,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wild = {"do_sample": True, "temperature": 1000.0, "repetition_penalty": 5.0}
    package = recommending(tiny_package.package, tmp_path / "out", wild)
    asked = ["--source", tiny_package.checkpoint, "--tasks", "passkey", "--lengths", "512"]
    found = []
    for each in (tiny_package.package, package):
        capsys.readouterr()
        assert moac_command("eval", each, *asked, "--samples", "2", "--json") == 0
        found.append(json.loads(capsys.readouterr().out)["results"])
    assert found[0] == found[1]

    def refuse(*_: Any) -> None:
        raise AssertionError("a check must not sample")

    monkeypatch.setattr(Sampler, "__init__", refuse)
    assert moac_command("verify", package) == 0
    with pytest.raises(AssertionError, match="must not sample"):
        moac_runtime.load(package).generate("hi")
