"""Chat templates that want out, never end, or write without end."""

from __future__ import annotations

import os
import re
import time

import pytest
from templates import ENDLESS

from moac_runtime.errors import ArtifactError, MoacError
from moac_runtime.text.renderer import RENDERER
from moac_runtime.text.template import ChatTemplate

TALK = [{"role": "user", "content": "hi"}]


def render(source: str) -> str:
    return ChatTemplate(source).render(TALK, add_generation_prompt=True, special_tokens={})


def refused(source: str) -> str:
    with pytest.raises(MoacError) as error:
        render(source)
    assert "--raw" in str(error.value)
    return str(error.value)


ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ strftime_now.__self__.__class__ }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ ('{0.__class__}' | string).format_map({'0': 1}) }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ raise_exception.__code__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ dict.__call__.__func__.__globals__ }}",
    "{% set n = namespace(__class__=1) %}{{ n }}",
    "{% set n = namespace() %}{% set n.__class__ = 1 %}{{ n }}",
)


@pytest.mark.parametrize("source", ESCAPES)
def test_the_way_out_is_closed(source: str) -> None:
    try:
        text = render(source)
    except MoacError:
        return
    for word in ("class", "module", "uid=", "built-in", "0x"):
        assert word not in text


@pytest.mark.parametrize("source", ["{% include '/etc/passwd' %}", "{% import 'os' as x %}"])
def test_no_file_is_read(source: str) -> None:
    assert "no loader" in refused(source)


def test_nothing_is_changed() -> None:
    assert "unsafe" in refused("{{ messages.append(1) }}")


@pytest.mark.parametrize("source", ENDLESS)
def test_what_never_ends_is_ended(source: str) -> None:
    started, sentence = time.monotonic(), refused(source)
    assert re.search("takes more than (2 s|512 MiB of memory)|writes more than 8 MiB", sentence)
    assert time.monotonic() - started < 60
    assert render("{{ messages[0].content }}") == "hi"  # and others go on


def test_what_writes_much_is_stopped() -> None:
    assert "writes more than 8 MiB" in refused(
        "{% for i in range(900) %}{{ 'x' * 10000 }}{% endfor %}"
    )
    assert len(render("{% for i in range(800) %}{{ 'x' * 10000 }}{% endfor %}")) == 8_000_000


def test_a_template_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(ArtifactError, match="more than 8 MiB"):
        ChatTemplate("x" * (8 * 2**20 + 1))


@pytest.mark.parametrize("source", ["{{ " + "(" * 400 + "1" + ")" * 400 + " }}", "{% endfor %}"])
def test_what_is_no_template_is_one_sentence(source: str) -> None:
    with pytest.raises(ArtifactError, match="not valid Jinja"):
        ChatTemplate(source)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="this system has no /proc")
def test_a_process_that_was_stopped_leaves_nothing_open() -> None:
    render("x")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        process = RENDERER._process
        assert process is not None
        process.kill()
        process.wait()
        render("x")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="this system has no /proc")
def test_the_process_that_renders_can_open_nothing() -> None:
    render("x")
    process = RENDERER._process
    assert process is not None
    with open(f"/proc/{process.pid}/limits") as file:
        limits = {line[:26].strip(): line[26:].split()[:2] for line in file}
    assert limits["Max open files"] == ["0", "0"]
    assert limits["Max file size"] == ["0", "0"]
    assert limits["Max address space"] == [str(512 * 2**20)] * 2
